"""Modules in memory, a plain reference written apart from the package, and what "token-exact" means.

The reference shares no code with what it judges: no seam, no pages, no kernels of ours. It runs whole sequences,
one module over the positions that the row gives it.
"""

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from heliostat.build import Loaded
from heliostat.engine.batch import passes_of
from heliostat.engine.engine import Engine
from heliostat.engine.request import Request, Sampling
from heliostat.family import SHARINGS, Row
from heliostat.linear.choice import add_columns
from heliostat.linear.columns import Columns
from heliostat.linear.lora import adapter_of, add_adapter, parts_of
from heliostat.linear.paca import columns_of
from heliostat.model.tokenizer import Tokenizer
from heliostat.model.transformer import Transformer
from heliostat.model.weights import state_of

CLOSE = 1e-4
"""Top two logits of the reference nearer than this are a tie: either token may win."""
PAGE = 4
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FULL, LORA, COLUMNS = ("a", "b", "c"), ("la", "lb"), "ca"


def _rows() -> dict[str, Row]:
    rows = {f"{name}-{own}": s.instantiate(own) for own in ("a", "la") for name, s in SHARINGS.items()}
    return rows | {
        "three-full": Row("a", "b", "c", "c"),
        "three-full-first": Row("a", "b", "c", "a"),
        "three-mixed": Row("la", "base", "lb", "lb"),
        "three-lora": Row("la", "lb", "base", "la"),
        "sun-columns": Row("ca", "base", "base", "ca"),
        "icarus-columns": Row("base", "base", "ca", "ca"),
        "lora-and-columns": Row("la", "la", "ca", "ca"),
        "writer-speaks": Row("a", "lb", "a", "a"),
        "late-speaker": Row("base", "base", "b", "base"),
        "base-speaks": Row("a", "a", "base", "base"),  # where icarus-a has a speak for base
    }


ROWS = _rows()
"""The four sharings with a full module and with an adapter, and rows that nobody has named yet."""


def toy_modules(model: Transformer, *, dtype: torch.dtype = torch.float32) -> dict[str, Loaded]:
    """base, three full modules, and on the base two low-rank adapters and one of columns, all different."""
    base = copy.deepcopy(model).to(dtype)
    modules = {"base": Loaded("base", "digest of base", "base", base)}
    for seed, name in enumerate(FULL, start=1):
        moved = _moved(copy.deepcopy(model), seed).to(dtype)
        modules[name] = Loaded(name, f"digest of {name}", name, moved)
    for seed, name in enumerate(LORA, start=11):
        adapt(base, name, seed)
        modules[name] = Loaded(name, f"digest of {name}", "base", base, name)
    tune_columns(base, COLUMNS, seed=21)
    modules[COLUMNS] = Loaded(COLUMNS, f"digest of {COLUMNS}", "base", base, COLUMNS)
    return modules


def _moved(model: Transformer, seed: int) -> Transformer:
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.08 * torch.randn(parameter.shape, generator=chance))
    return model


def adapt(model: Transformer, name: str, seed: int) -> None:
    """Put an adapter on the model, filled by chance."""
    chance = torch.Generator().manual_seed(seed)
    add_adapter(model, name, r=4, alpha=8, targets=TARGETS)
    for part in adapter_of(model, name).values():
        part.a.data = (0.2 * torch.randn(part.a.shape, generator=chance)).to(model.dtype)
        part.b.data = (0.2 * torch.randn(part.b.shape, generator=chance)).to(model.dtype)
        part.requires_grad_(False)


def tune_columns(model: Transformer, name: str, seed: int) -> None:
    """Put columns on the model, tuned by chance."""
    chance = torch.Generator().manual_seed(seed)
    add_columns(model, name, r=8, targets=TARGETS, seed=seed)
    for part in columns_of(model, name).values():
        part.delta.data = (0.2 * torch.randn(part.delta.shape, generator=chance)).to(model.dtype)
        part.requires_grad_(False)


# --- the reference -------------------------------------------------------------------------------------------

Cache = list[tuple[Tensor, Tensor]]  # by layer: keys and values [positions, K, D]


class Plain:
    """One module as plain arithmetic over its tensors, adapters multiplied out."""

    def __init__(self, module: Loaded) -> None:
        self.config = module.model.config
        state = {name: tensor.float().clone() for name, tensor in state_of(module.model).items()}
        for path, part in parts_of(module.model, module.adapter or "").items():
            weight = state[f"{path}.weight"]
            if isinstance(part, Columns):
                weight[:, part.columns.tolist()] += part.delta.float()
            else:
                weight = weight + part.scale * part.b.float() @ part.a.float()
            state[f"{path}.weight"] = weight
        self.state = state

    def run(
        self, ids: Sequence[int], first: int, past: Cache, *, writes: bool = True
    ) -> tuple[Tensor, Cache]:
        """Logits [T, V] of ``ids`` at positions from ``first``, and what it writes there.

        It sees ``past``, and its own positions too where it writes; else ``past`` reaches over them.
        """
        c, t = self.config, self.state
        x, written = t["model.embed_tokens.weight"][list(ids)], []
        places = torch.arange(first, first + len(ids))
        for layer in range(c.layers):
            head = f"model.layers.{layer}."
            normed = self._norm(x, f"{head}input_layernorm.weight")
            q, k, v = (self._heads(normed, f"{head}self_attn.{p}_proj") for p in "qkv")
            q, k = self._turn(q, places), self._turn(k, places)
            written.append((k, v))
            keys, values = (
                torch.cat([old, new] if writes else [old])
                for old, new in zip(past[layer], (k, v), strict=True)
            )
            said = self._weigh(self._attend(q, keys, values, places, head), values, places, normed, head)
            x = x + self._linear(said.flatten(1), f"{head}self_attn.o_proj")
            normed = self._norm(x, f"{head}post_attention_layernorm.weight")
            gate, up = (self._linear(normed, f"{head}mlp.{p}_proj") for p in ("gate", "up"))
            x = x + self._linear(silu(gate) * up, f"{head}mlp.down_proj")
        out = t["model.embed_tokens.weight" if c.tied else "lm_head.weight"]
        return self._norm(x, "model.norm.weight") @ out.T, written

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.config.norm_eps).sqrt() * self.state[name]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state.get(f"{name}.bias", 0)

    def _heads(self, x: Tensor, name: str) -> Tensor:
        return self._linear(x, name).reshape(len(x), -1, self.config.head_width)

    def _turn(self, x: Tensor, places: Tensor) -> Tensor:
        half = self.config.head_width // 2
        speeds = self.config.rope["rope_theta"] ** (-torch.arange(half) / half)
        angles = (places[:, None] * speeds)[:, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, places: Tensor, name: str) -> Tensor:
        out, sinks = torch.empty_like(q), self.state.get(f"{name}self_attn.sinks")
        for head, row in itertools.product(range(q.shape[1]), range(len(q))):
            seen, group = int(places[row]) + 1, head * keys.shape[1] // q.shape[1]
            scores = keys[:seen, group] @ q[row, head] / math.sqrt(q.shape[2])
            if sinks is not None:
                scores = torch.cat([scores, sinks[head : head + 1]])
            out[row, head] = scores.softmax(0)[:seen] @ values[:seen, group]
        return out

    def _weigh(self, said: Tensor, values: Tensor, places: Tensor, x: Tensor, name: str) -> Tensor:
        """Affine-scaled and gated, as the model's options say; x [T, E] is what the block's attention was given."""
        kind, own = self.config.attention, f"{name}self_attn."
        if kind.affine:
            learned = f"{own}alpha_proj" if kind.alpha == "learned" else None
            alpha = (0.1 * self._linear(x, learned) + 0.5).clamp(0, 1) if learned else torch.tensor([[0.5]])
            for row, place in enumerate(places.tolist()):
                count = kind.length or place + 1
                beta = (self.state[f"{own}alpha_ma"] - alpha[row % len(alpha)]) / count
                whole = values[: place + 1].sum(0).repeat_interleave(said.shape[1] // values.shape[1], 0)
                said[row] = alpha[row % len(alpha), :, None] * said[row] + beta[:, None] * whole
        if kind.gated:
            said = said * self._linear(x, f"{own}head_gate").sigmoid()[..., None]
        return said


def reference(row: Row, modules: Mapping[str, Loaded], ids: Sequence[int], prompt: int) -> Tensor:
    """Logits [T - prompt, V] that choose ids[prompt:], after a prompt of so many tokens."""
    plain = {name: Plain(modules[name]) for name in row.modules}
    config = plain[row.speaker].config
    nothing = torch.empty(0, config.kv_heads, config.head_width)
    past: Cache = [(nothing, nothing)] * config.layers
    boundary = prompt if row.first_speaker == row.prompt_writer else prompt - 1
    said = []
    if boundary:
        logits, past = plain[row.prompt_writer].run(ids[:boundary], 0, past)
        said = [logits[-1:]] if boundary == prompt else []
    rest = ids[boundary:-1]
    if rest:
        logits, written = plain[row.answer_writer].run(rest, boundary, past)
        if row.speaker != row.answer_writer:
            whole = [
                tuple(torch.cat(kv) for kv in zip(*two, strict=True))
                for two in zip(past, written, strict=True)
            ]
            logits, _ = plain[row.speaker].run(rest, boundary, whole, writes=False)  # type: ignore[arg-type]
        said.append(logits)
    return torch.cat(said)


# --- serving -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Job:
    """One request to serve."""

    row: Row
    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=lambda: Sampling(max_tokens=8, ignore_eos=True, logprobs=2))
    salt: str = ""


@dataclass(frozen=True, slots=True)
class Served:
    """What came back: token ids, their log-probabilities, how far the best two were apart."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    gaps: tuple[float, ...]
    cached: int
    preemptions: int


def make_engine(
    modules: Mapping[str, Loaded], tokenizer: Tokenizer, *, pages: int = 400, **options: Any
) -> Engine:
    """An engine with small pages, so that short texts cross many borders."""
    return Engine(modules, tokenizer, max_length=128, pages=pages, page_size=PAGE, **options)


_numbers = itertools.count()


def request_of(engine: Engine, job: Job) -> Request:
    """A request that the engine takes."""
    digests = {name: engine.digests[name] for name in job.row.modules}
    name = f"request {next(_numbers)}"
    return Request(
        name, row=job.row, digests=digests, prompt=job.prompt, sampling=job.sampling, salt=job.salt
    )


def serve(engine: Engine, jobs: Sequence[Job]) -> list[Served]:
    """Answers to all jobs in one batch."""
    requests = [request_of(engine, job) for job in jobs]
    said: dict[str, list[tuple[float, float]]] = {request.id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.unfinished:
        for piece in engine.step():
            assert piece.sampled is not None
            best = sorted((chance for _, chance in piece.sampled.top), reverse=True)
            gap = best[0] - best[1] if len(best) > 1 else math.inf
            said[piece.request.id].append((piece.sampled.logprob or 0.0, gap))
    return [
        Served(
            tuple(r.answer),
            tuple(chance for chance, _ in said[r.id]),
            tuple(gap for _, gap in said[r.id]),
            r.cached_tokens,
            r.preemptions,
        )
        for r in requests
    ]


def served_chances(engine: Engine, row: Row, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Log-probabilities [T] of an answer's tokens, served step by step, each forced instead of sampled."""
    return served_logits(engine, row, prompt, answer).log_softmax(-1)[range(len(answer)), list(answer)]


def served_logits(engine: Engine, row: Row, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Logits [T, V] that would choose each token of an answer, when the tokens before it were said."""
    request = request_of(engine, Job(row, tuple(prompt), Sampling(max_tokens=len(answer), ignore_eos=True)))
    engine.scheduler.add(request)
    rows = []
    while engine.scheduler.unfinished:
        step = engine.scheduler.schedule()
        asked, logits = engine.runner.run(passes_of(step, engine._runs, page_size=engine.table.page_size))
        rows += list(logits.clone())
        engine.scheduler.commit(step, {r.id: answer[len(r.answer)] for r in asked})
    return torch.stack(rows)


# --- token-exact ---------------------------------------------------------------------------------------------


class Exactness:
    """Compares answers token by token and counts the ties that ended a comparison."""

    def __init__(self) -> None:
        self.tokens = 0
        self.ties = 0

    def same(self, got: Sequence[int], want: Sequence[int], gaps: Sequence[float], *, what: str = "") -> None:
        """Fail unless ``got`` is ``want`` up to a tie; ``gaps`` are the reference's, between its top two logits."""
        for place, (ours, theirs, gap) in enumerate(zip(got, want, gaps, strict=True)):
            if ours != theirs and gap < CLOSE:
                self.ties += 1
                return
            assert ours == theirs, f"{what} token {place}: {ours}, the reference says {theirs} by {gap:.2e}"
            self.tokens += 1

    def same_served(self, got: Sequence[Served], want: Sequence[Served]) -> None:
        """The same for whole batches of answers."""
        for number, (ours, theirs) in enumerate(zip(got, want, strict=True)):
            self.same(ours.ids, theirs.ids, theirs.gaps, what=f"answer {number}")

    def same_as_reference(
        self, got: Served, row: Row, modules: Mapping[str, Loaded], prompt: Sequence[int]
    ) -> None:
        """Fail unless a greedy answer is the reference's."""
        logits = reference(row, modules, [*prompt, *got.ids], len(prompt))
        best = logits.topk(2)
        gaps = (best.values[:, 0] - best.values[:, 1]).tolist()
        self.same(got.ids, best.indices[:, 0].tolist(), gaps, what=str(row))
