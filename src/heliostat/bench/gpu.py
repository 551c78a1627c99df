"""On a GPU: decoding with recorded passes and without, attention over pages by each body, prefill, families of members.

``--dry-run`` runs all of it with tiny shapes on the CPU, where a recorded pass is the function itself: it shows that the
script works, and its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from heliostat.bench.birth import certificate
from heliostat.bench.decode import PROMPT, STEPS, Ours, median, prompts, shape
from heliostat.bench.gpu_codebook import codebooks, table
from heliostat.bench.gpu_families import LLAMA_8B, Families, consolidated, tables
from heliostat.build import Loaded, best_dtype, device_named
from heliostat.engine.engine import PAGE_SIZE
from heliostat.engine.graphs import as_it_is
from heliostat.engine.runner import Runner
from heliostat.errors import Refused
from heliostat.files import atomic_write_text
from heliostat.model.config import parse_config
from heliostat.model.transformer import Transformer
from heliostat.ops.decoding import Body, RowPages, has_triton, plain_rows, torch_rows, triton_rows

TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
LONGEST = 4096
"""Tokens of context up to which attention is measured."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured."""

    device: str
    model: Mapping[str, Any]
    batches: Sequence[int]
    contexts: Sequence[int]
    repeats: int
    families: Families


def real(device: str, model: str, repeats: int) -> Plan:
    """On a GPU. Raises Refused where there is none."""
    if torch.device(device).type != "cuda":
        raise Refused(f"device is {device}; this measures a GPU: take a machine with one, or --dry-run")
    return Plan(
        device,
        shape(model),
        (1, 2, 4, 8, 16, 32, 64),
        (256, 1024, LONGEST),
        repeats,
        Families(device, LLAMA_8B),
    )


def tiny() -> Plan:
    """Everywhere, in seconds."""
    model = {**shape("24M"), **TINY, "num_key_value_heads": 2}
    families = Families("cpu", model, 2, 3, (1, 2), prompt=20, context=40, steps=5, repeats=1)
    return Plan("cpu", model, (1, 3), (40, 600), 1, families)


def engine_of(plan: Plan) -> Ours:
    """The engine around random weights; on a CPU it records as well, so that the same lines run."""
    torch.manual_seed(0)
    model = Transformer(parse_config(plan.model)).to(plan.device, best_dtype(plan.device))
    ours = Ours(model.requires_grad_(False))
    if ours.engine.runner.graphs is None:
        modules = {"base": Loaded("base", "bench", "base", ours.model)}
        pages = ours.engine.table.pages
        ours.engine.runner = Runner(modules, pages=pages, page_size=PAGE_SIZE, record=as_it_is)
    return ours


def decoding(ours: Ours, plan: Plan) -> list[dict[str, Any]]:
    """Seconds of a step with recorded passes and without, in turn, for each batch size."""
    runner, rows = ours.engine.runner, []
    graphs = runner.graphs
    assert graphs is not None
    for batch in plan.batches:
        found: dict[str, list[float]] = {"on": [], "off": []}
        for number in range(plan.repeats + 1):
            for how, kept in (("on", graphs), ("off", None)):
                runner.graphs = kept
                took = ours.decode(batch, 1000 * batch + 2 * number + (kept is None))
                found[how] += [took] if number else []  # the first time records and compiles
        runner.graphs = graphs
        row: dict[str, Any] = {key: statistics.median(values) for key, values in found.items()}
        rows.append({"batch": batch, **row})
    if graphs.failure:
        raise Refused(f"passes could not be recorded: {graphs.failure}")
    return rows


@torch.inference_mode()
def attention(plan: Plan) -> list[dict[str, Any]]:
    """Seconds of attention in one layer by each body, and how far each is from the plain twin."""
    heads, kv_heads = plan.model["num_attention_heads"], plan.model["num_key_value_heads"]
    width, dtype, rows = plan.model["hidden_size"] // heads, best_dtype(plan.device), []
    bodies: dict[str, Body] = {"torch": torch_rows}
    if has_triton() and plan.device != "cpu":
        bodies["triton"] = triton_rows
    for batch in plan.batches:
        for context in plan.contexts:
            wide = -(-context // PAGE_SIZE)
            like: dict[str, Any] = {"device": plan.device, "dtype": dtype}
            keys, values = (torch.randn(batch * wide, PAGE_SIZE, kv_heads, width, **like) for _ in range(2))
            q = torch.randn(batch, heads, width, **like)
            pages = torch.randperm(batch * wide, device=plan.device).view(batch, wide)
            seen = RowPages(pages, torch.full((batch,), context, device=plan.device))
            want = plain_rows(q, keys, values, seen).float()
            row: dict[str, Any] = {"batch": batch, "context": context}
            for name, body in bodies.items():
                run = partial(body, q, keys, values, seen)
                row[f"{name}_error"] = float((run().float() - want).abs().max())
                row[name] = median(partial(_whole, run, plan.device), repeats=3 * plan.repeats)
            row["plain"] = median(partial(_whole, partial(plain_rows, q, keys, values, seen), plan.device), 1)
            rows.append(row)
    return rows


def _whole(run: Any, device: str) -> None:
    run()
    if device != "cpu":
        torch.cuda.synchronize(device)


def prefill(ours: Ours, plan: Plan) -> list[dict[str, Any]]:
    """Prompt tokens a second, fresh prompts, until each has its first token."""
    rows = []
    for batch in plan.batches:
        seconds = []
        for number in range(plan.repeats + 1):
            asked = prompts(batch, 10**6 + 1000 * batch + number)
            begin = time.perf_counter()
            ours.answer(asked, 1)
            seconds.append(time.perf_counter() - begin)
        rows.append({"batch": batch, "tokens": batch * PROMPT / statistics.median(seconds[1:])})
    return rows


def page(found: Mapping[str, Any], birth: Mapping[str, Any]) -> str:
    """The tables."""
    lines = [
        "# On a GPU",
        "",
        f"Random weights of a Llama's shape, {birth['dtype']}, prompts of {PROMPT} fresh tokens, {STEPS} answer tokens,",
        "greedy. A step counts whole: scheduling, passes, sampling, text. Medians, with and without in turn.",
        "",
        f"`{birth['command']}`; {birth['hardware']}; commit {birth['commit']}; {birth['date']}; "
        f"torch {birth['versions']['torch']}",
        "",
        "| batch | decode, tokens/s | without recorded passes | ratio | prefill, tokens/s |",
        "|---|---|---|---|---|",
    ]
    for row, first in zip(found["decode"], found["prefill"], strict=True):
        on, off, batch = row["on"], row["off"], row["batch"]
        lines.append(
            f"| {batch} | {batch / on:.0f} | {batch / off:.0f} | {off / on:.2f}x | {first['tokens']:.0f} |"
        )
    lines += [
        "",
        "Attention of one layer over pages, microseconds; in brackets the largest distance from the plain twin:",
        "",
        "| batch | context | Triton | torch | plain |",
        "|---|---|---|---|---|",
    ]
    for row in found["attention"]:
        told = [
            f"{1e6 * row[n]:.0f} ({row[f'{n}_error']:.1e})" if n in row else "-" for n in ("triton", "torch")
        ]
        lines.append(
            f"| {row['batch']} | {row['context']} | {told[0]} | {told[1]} | {1e6 * row['plain']:.0f} |"
        )
    each, context = found["each"], found["context"]
    lines += tables(found["families"], each, context)
    return "\n".join([*lines, *table(found["codebooks"]), ""])


def main(given: Sequence[str] | None = None) -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="100M")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--docs", type=Path)
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes on the CPU, into a temporary folder"
    )
    asked = parser.parse_args(given)
    plan = tiny() if asked.dry_run else real(device_named(asked.device), asked.model, asked.repeats)
    ours = engine_of(plan)
    found = {
        "each": plan.families.each,
        "context": plan.families.context,
        "decode": decoding(ours, plan),
        "attention": attention(plan),
        "prefill": prefill(ours, plan),
        "families": consolidated(plan.families),
        "codebooks": codebooks(plan.device, [b for b in plan.batches if b <= 32], plan.repeats),
    }
    command = f"python -m heliostat.bench.gpu --model {asked.model} --repeats {asked.repeats}"
    kind = str(ours.model.dtype).removeprefix("torch.")
    birth = certificate("python -m heliostat.bench.gpu --dry-run" if asked.dry_run else command, dtype=kind)
    docs = asked.docs or Path(tempfile.mkdtemp() if asked.dry_run else "docs/results")
    docs.mkdir(parents=True, exist_ok=True)
    atomic_write_text(docs / "gpu.json", json.dumps({"birth": birth, "rows": found}, indent=1) + "\n")
    atomic_write_text(docs / "gpu.md", page(found, birth))
    print(f"written: {docs / 'gpu.md'}")


if __name__ == "__main__":
    main()
