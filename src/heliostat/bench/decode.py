"""How fast answers are decoded: the whole engine beside transformers' generate, bare products, and the memory's speed.

One model of random weights, fresh prompts, greedy, bfloat16 where the processor has it; everything in one process, in
turn, medians. A step of the engine counts whole: scheduling, passes, sampling, text.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heliostat.bench.birth import certificate
from heliostat.bench.trial import EMBEDDED_BASE
from heliostat.build import Loaded, best_dtype, device_named
from heliostat.engine.batch import passes_of
from heliostat.engine.engine import PAGE_SIZE, Engine
from heliostat.engine.paged import Ask
from heliostat.engine.request import Request, Sampling
from heliostat.family import Row
from heliostat.files import atomic_write_text
from heliostat.model.config import parse_config
from heliostat.model.tokenizer import Tokenizer
from heliostat.model.transformer import Transformer
from heliostat.ops import native
from heliostat.ops.linear import linear
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
ROW = Row("base", "base", "base", "base")


def shape(name: str) -> dict[str, Any]:
    """A Llama of about that many parameters, as its config.json says it."""
    heads = SHAPES[name]["num_attention_heads"]
    more = {"vocab_size": 32_000, "num_key_value_heads": heads // 3, "max_position_embeddings": 1024}
    return {"model_type": "llama", "tie_word_embeddings": True, "rms_norm_eps": 1e-6, **SHAPES[name], **more}


def prompts(batch: int, seed: int) -> list[list[int]]:
    """Random token ids, never the same for two seeds, so that no cache helps."""
    made = torch.Generator().manual_seed(seed)
    return torch.randint(3, 1000, (batch, PROMPT), generator=made).tolist()


class Ours:
    """The engine around one model."""

    def __init__(self, model: Transformer) -> None:
        model.join()
        self.model = model
        self.engine = Engine(
            {"base": Loaded("base", "bench", "base", model)},
            Tokenizer.load(EMBEDDED_BASE),
            max_length=PROMPT + STEPS + PAGE_SIZE,
            pages=64 * (1 + (PROMPT + STEPS) // PAGE_SIZE),
        )

    def add(self, batch: int, seed: int) -> None:
        """So many requests, as yet unanswered."""
        wish = Sampling(max_tokens=STEPS + 1, ignore_eos=True)
        for number, prompt in enumerate(prompts(batch, seed)):
            digests = dict(self.engine.digests)
            self.engine.add(
                Request(f"{seed}-{number}", row=ROW, digests=digests, prompt=tuple(prompt), sampling=wish)
            )

    def decode(self, batch: int, seed: int) -> float:
        """Median seconds of a step in which every request gets a token."""
        self.add(batch, seed)
        seconds = []
        while self.engine.unfinished:
            begin = time.perf_counter()
            said = len(self.engine.step())
            if said == batch:
                seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds[1:])

    def planning(self, batch: int, seed: int) -> float:
        """Median seconds a step takes for what is not arithmetic: scheduling and laying out passes."""
        self.add(batch, seed)
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


def theirs(model: Any, batch: int, seed: int) -> float:
    """Seconds a token of transformers' generate: of a long answer less a short one, so that the prompt does not count."""
    ids, few = torch.tensor(prompts(batch, seed), device=model.device), 2
    took = []
    for count in (few, few + STEPS):
        begin = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        took.append(time.perf_counter() - begin)
    return (took[1] - took[0]) / STEPS


@torch.inference_mode()
def bare(model: Transformer, batch: int) -> float:
    """Seconds of a step's products and attention alone."""
    config, count = model.config, 240 // PAGE_SIZE
    like: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
    q = torch.zeros(batch, config.heads, config.head_width, **like)
    pages = torch.zeros(batch * count, PAGE_SIZE, config.kv_heads, config.head_width, **like)
    narrow, wide = torch.zeros(batch, config.width, **like), torch.zeros(batch, config.mlp_width, **like)
    ask = _ask(batch, count, pages)

    def once() -> None:
        for block in model.blocks:
            attention, mlp = block.self_attn, block.mlp
            assert attention.joined is not None and mlp.joined is not None
            linear(narrow, attention.joined.weight)
            ask(q, pages, pages)
            linear(q.flatten(1), attention.o_proj.weight)
            linear(narrow, mlp.joined.weight)
            linear(wide, mlp.down_proj.weight)
        linear(narrow, model.lm_head.weight)
        _wait(model.device)

    return median(once)


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


def measure(name: str, *, repeats: int, device: str = "cpu") -> list[dict[str, Any]]:
    """A row for each batch size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    kind = best_dtype(device)
    their: Any = LlamaForCausalLM(LlamaConfig(**shape(name)))
    their = their.to(device, kind).eval()
    model = Transformer(parse_config(shape(name))).to(device, kind).requires_grad_(False)
    state = their.state_dict()
    model.load_state_dict({key: state[key].clone() for key in model.state_dict()})
    ours, speed = Ours(model), bandwidth(model.device)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    rows = []
    for batch in BATCHES:
        found: dict[str, list[float]] = {"engine": [], "transformers": [], "bare": []}
        for number in range(repeats):
            found["engine"].append(ours.decode(batch, 1000 * batch + number))
            found["transformers"].append(theirs(their, batch, 1000 * batch + number))
            found["bare"].append(bare(model, batch))
        row: dict[str, Any] = {key: statistics.median(values) for key, values in found.items()}
        row |= {"model": name, "batch": batch, "memory": size / speed}
        rows.append(row)
        print(_line(row), flush=True)
    plan, step = ours.planning(64, 7), ours.decode(64, 8)
    rows[-1]["planning"] = plan / step
    print(f"planning at 64 requests: {1e3 * plan:.2f} ms of {1e3 * step:.1f} ms", flush=True)
    return rows


def _line(row: Mapping[str, Any]) -> str:
    return (
        f"| {row['model']} | {row['batch']} | {row['batch'] / row['engine']:.0f} | "
        f"{row['transformers'] / row['engine']:.2f}x | {row['engine'] / row['bare']:.2f}x | "
        f"{row['engine'] / row['memory']:.2f}x |"
    )


def _page(rows: list[dict[str, Any]], birth: Mapping[str, Any]) -> str:
    planning = ", ".join(f"{row['planning']:.1%} ({row['model']})" for row in rows if "planning" in row)
    lines = [
        "# Decoding: the engine's speed",
        "",
        f"Random weights of a Llama's shape, {birth['dtype']}, prompts of {PROMPT} fresh tokens, {STEPS} answer tokens,",
        "greedy. A step of the engine counts whole; *bare* are its products and attention alone; *memory* is one reading",
        "of all weights at the speed that reading reaches here. More is better in the third and fourth column, less in",
        f"the last two. Scheduling and laying out passes take {planning} of a step at 64 running requests.",
        "",
        f"`{birth['command']}`; {birth['hardware']}, {birth['threads']} threads; commit {birth['commit']}; "
        f"{birth['date']}; transformers {birth['versions']['transformers']}",
        "",
        "| model | batch | tokens/s | against transformers' generate | step / bare | step / memory |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(_line, rows), ""])


def main() -> None:
    """Measure every shape and batch and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    given = parser.parse_args()
    how: dict[str, Any] = {"repeats": given.repeats, "device": device_named(given.device)}
    rows = [row for name in given.models.split(",") for row in measure(name, **how)]
    command = f"python -m heliostat.bench.decode --models {given.models} --repeats {given.repeats}"
    command += f" --device {given.device}"
    kind = str(best_dtype(how["device"])).removeprefix("torch.")
    birth = certificate(command, repeats=given.repeats, dtype=kind)
    name = "decode" if how["device"] == "cpu" else "decode-gpu"
    given.docs.mkdir(parents=True, exist_ok=True)
    atomic_write_text(
        given.docs / f"{name}.json", json.dumps({"birth": birth, "rows": rows}, indent=1) + "\n"
    )
    atomic_write_text(given.docs / f"{name}.md", _page(rows, birth))


if __name__ == "__main__":
    main()
