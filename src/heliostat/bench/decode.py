"""A decode step of the engine beside its own parts: bare products and attention, one reading of the weights, planning.

``python -m heliostat.bench.decode FOLDER SEED`` says it as JSON, for the model in FOLDER. A step counts whole:
scheduling, passes, sampling, text. ``heliostat.bench.engine`` asks for it and sets other engines beside it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heliostat.bench.trial import EMBEDDED_BASE
from heliostat.build import Loaded, best_dtype
from heliostat.engine.batch import passes_of
from heliostat.engine.engine import PAGE_SIZE, Engine
from heliostat.engine.paged import Ask, PagePool
from heliostat.engine.request import Request, Sampling
from heliostat.family import Row
from heliostat.model.config import read_config
from heliostat.model.tokenizer import Tokenizer
from heliostat.model.transformer import Transformer
from heliostat.model.weights import load_transformer
from heliostat.ops import native
from heliostat.ops.linear import linear
from heliostat.ops.native.blocks import Piece
from heliostat.ops.paging import PagedGroup, grouped_attention

SHAPES: Mapping[str, Mapping[str, int]] = {
    "24M": {"hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 6, "intermediate_size": 1024},
    "100M": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 2048,
    },
}
BATCHES = (1, 8, 32)
PROMPT, STEPS = 224, 32
"""Tokens of each prompt, and of each answer: the middle of the answers is at 240 tokens of context."""
LONGEST = 2304
MOST_RUNNING = 64
ROW = Row("base", "base", "base", "base")


def shape(name: str) -> dict[str, Any]:
    """A Llama of about that many parameters, as its config.json says it."""
    heads = SHAPES[name]["num_attention_heads"]
    more = {"vocab_size": 32_000, "num_key_value_heads": heads // 3, "max_position_embeddings": LONGEST}
    return {"model_type": "llama", "tie_word_embeddings": True, "rms_norm_eps": 1e-6, **SHAPES[name], **more}


def prompts(batch: int, seed: int, length: int = PROMPT) -> list[list[int]]:
    """Random token ids, never the same for two seeds, so that no cache helps."""
    made = torch.Generator().manual_seed(seed)
    return torch.randint(3, 1000, (batch, length), generator=made).tolist()


class Ours:
    """The engine around one model."""

    def __init__(self, model: Transformer, *, most: int = PROMPT + STEPS + PAGE_SIZE) -> None:
        """``most``: tokens of the longest text; there are pages for as many requests of PROMPT as may run."""
        model.join()
        self.model, self._count = model, 0
        each = 1 + (PROMPT + STEPS) // PAGE_SIZE
        self.engine = Engine(
            {"base": Loaded("base", "bench", "base", model)},
            Tokenizer.load(EMBEDDED_BASE),
            max_length=most,
            pages=max(MOST_RUNNING * each, 2 * most // PAGE_SIZE),
        )

    def add(self, asked: Sequence[Sequence[int]], count: int) -> None:
        """Requests for so many tokens each, as yet unanswered."""
        wish = Sampling(max_tokens=count, ignore_eos=True)
        for prompt in asked:
            self._count += 1
            digests = dict(self.engine.digests)
            self.engine.add(
                Request(str(self._count), row=ROW, digests=digests, prompt=tuple(prompt), sampling=wish)
            )

    def answer(self, asked: Sequence[Sequence[int]], count: int) -> list[float]:
        """Answers of ``count`` tokens to these prompts; says when each step was done."""
        self.add(asked, count)
        marks, said = [], 0
        while self.engine.unfinished:
            said += len(self.engine.step())
            marks.append(time.perf_counter())
        assert said == len(asked) * count
        return marks

    def decode(self, batch: int, seed: int) -> float:
        """Median seconds of a step in which every request gets a token."""
        self.add(prompts(batch, seed), STEPS + 1)
        seconds = []
        while self.engine.unfinished:
            begin = time.perf_counter()
            said = len(self.engine.step())
            if said == batch:
                seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds[1:])

    def planning(self, batch: int, seed: int) -> float:
        """Median seconds a step takes for what is not arithmetic: scheduling and laying out passes."""
        self.add(prompts(batch, seed), STEPS + 1)
        engine, seconds = self.engine, []
        schedule, commit = engine.scheduler.schedule, engine.scheduler.commit
        while engine.unfinished:
            begin = time.perf_counter()
            step = schedule()
            passes_of(step, {"base": ("base", None)}, page_size=PAGE_SIZE)
            took = time.perf_counter() - begin
            tokens = {chunk.request.id: 5 for chunk in step.chunks if chunk.speaker is not None}
            begin = time.perf_counter()
            commit(step, tokens)
            if len(tokens) == batch:
                seconds.append(took + time.perf_counter() - begin)
        return statistics.median(seconds)


def ours(folder: str, *, most: int = PROMPT + STEPS + PAGE_SIZE) -> Ours:
    """The engine around the checkpoint in ``folder``, in bfloat16 where the processor has it."""
    model = load_transformer(Path(folder), read_config(Path(folder)), dtype=best_dtype())
    return Ours(model.requires_grad_(False), most=most)


@torch.inference_mode()
def bare(model: Transformer, batch: int) -> float:
    """Seconds of a step's products and attention alone, each layer over pages of its own, as in a step."""
    config, count = model.config, 240 // PAGE_SIZE
    like: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
    q = torch.zeros(batch, config.heads, config.head_width, **like)
    pool = PagePool(
        config, pages=batch * count, page_size=PAGE_SIZE, dtype=model.dtype, device=str(model.device)
    )
    narrow, wide = torch.zeros(batch, config.width, **like), torch.zeros(batch, config.mlp_width, **like)
    ask = _ask(batch, count, pool.keys[0])
    products = [block.weights(looked_up=False).products for block in model.blocks]

    def once() -> None:
        for layer, own in enumerate(products):
            _each(narrow, own["qkv"])
            ask(q, pool.keys[layer], pool.values[layer])
            _each(q.flatten(1), own["o"])
            _each(narrow, own["gate_up"])
            _each(wide, own["down"])
        linear(narrow, model.lm_head.weight)
        _wait(model.device)

    return median(once)


def _each(x: Tensor, pieces: Sequence[Piece]) -> None:
    for piece in pieces:
        assert isinstance(piece.weight, Tensor)
        linear(x, piece.weight)


def _ask(batch: int, count: int, pages: Tensor) -> Ask:
    """Attention of one query a request over ``count`` pages each, as the engine would have it done."""
    each = torch.arange(batch, device=pages.device)
    numbers, seen = torch.arange(batch * count, device=pages.device), torch.full_like(each, count * PAGE_SIZE)
    if native.attends(pages):
        starts = torch.arange(batch + 1)
        return partial(native.attend, entries=native.Ragged(each, seen, starts, numbers, each * count))
    group = PagedGroup(each[:, None], numbers.view(batch, count), seen[:, None], count * PAGE_SIZE)
    return partial(grouped_attention, groups=[group])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def bandwidth(device: torch.device) -> float:
    """Bytes a second that reading memory reaches: a product of one row with more weight than any cache holds."""
    weights = [torch.zeros(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(4)]
    x = torch.zeros(1, 8192, dtype=torch.bfloat16, device=device)

    def once() -> None:
        for weight in weights:
            linear(x, weight)
        _wait(device)

    return 4 * 2 * 8192**2 / median(once)


def median(run: Callable[[], object], repeats: int = 9) -> float:
    """Median seconds, after a first time that does not count."""
    run()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def parts(folder: str, seed: int) -> dict[str, Any]:
    """Seconds: ``step`` and ``bare`` by batch, ``memory`` of one reading of the weights, ``planning`` and ``busy`` step at
    MOST_RUNNING requests."""
    mine = ours(folder)
    size = sum(p.numel() * p.element_size() for p in mine.model.parameters())
    mine.decode(2, seed)
    found: dict[str, Any] = {"step": {}, "bare": {}}
    for batch in BATCHES:
        found["bare"][str(batch)] = bare(mine.model, batch)
        found["step"][str(batch)] = mine.decode(batch, seed + batch)
    found["memory"] = size / bandwidth(mine.model.device)
    found["planning"] = mine.planning(MOST_RUNNING, seed + 100)
    found["busy"] = mine.decode(MOST_RUNNING, seed + 200)
    return found


if __name__ == "__main__":
    print(json.dumps(parts(sys.argv[1], int(sys.argv[2]))))
