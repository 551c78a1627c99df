"""Products with weights in codebooks beside dense ones, other people's low-bit kernels and the memory: same run, medians.

The weights of a measurement are so many that they exceed every cache, and are taken in turn. HELIOSTAT_GGML names a folder
with llama.cpp's libraries, HELIOSTAT_AQLM an interpreter and, behind a colon, the file of AQLM's numba kernel; what is not
named is not measured, and the page says so.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from heliostat.bench import kernel_peers
from heliostat.errors import Refused
from heliostat.ops import native
from heliostat.ops.codebook import Coded
from heliostat.ops.codebook_format import Format
from heliostat.ops.codebook_product import most_rows
from heliostat.ops.native import coded as kernel

SHAPES = ((4096, 4096), (768, 768), (2048, 768), (768, 2048), (2048, 2048), (8192, 2048), (2048, 8192))
FORMATS = ("m1v4g128", "m2v8g128", "m2v4g128")
BATCHES = (1, 2, 4, 8, 16, 32)
PEERS = {"ggml": "HELIOSTAT_GGML", "aqlm": "HELIOSTAT_AQLM"}
Run = Callable[[Tensor], object]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured: weights [outputs, inputs], at least so many bytes of each kind taken in turn."""

    shapes: tuple[tuple[int, int], ...] = SHAPES
    formats: tuple[str, ...] = FORMATS
    batches: tuple[int, ...] = BATCHES
    bytes: int = 260 << 20
    repeats: int = 5
    minutes: float = 3.8


def made(format: Format, outputs: int, inputs: int) -> Coded:
    """A weight of random codes: what they say changes no time."""
    shapes = format.shapes(outputs, inputs)
    books = torch.randn(shapes["codebooks"]) / (format.m * inputs) ** 0.5
    codes = torch.randint(256, shapes["codes"], dtype=torch.uint8)
    return Coded(format, inputs, codes, books.half(), (torch.rand(shapes["scales"]) + 0.5).half())


def seconds(runs: Sequence[Run], x: Tensor, plan: Plan) -> float:
    """Median seconds of one product over the rotation's rounds, after one that does not count."""
    found = []
    for _ in range(plan.repeats + 1):
        begin = time.perf_counter()
        for run in runs:
            run(x)
        found.append((time.perf_counter() - begin) / len(runs))
    return statistics.median(found[1:])


def _in_float(weight: Tensor, x: Tensor) -> Tensor:
    return functional.linear(x.float(), weight)


def _in_bytes(weight: Tensor, scales: Tensor, x: Tensor) -> Tensor:
    return torch._weight_int8pack_mm(x, weight, scales)


def dense(outputs: int, inputs: int, plan: Plan) -> dict[str, dict[int, float]]:
    """Seconds by who multiplies and batch; each at its best setting here."""
    found: dict[str, dict[int, float]] = {}
    count = max(2, plan.bytes // (2 * outputs * inputs))
    half = [torch.randn(outputs, inputs).bfloat16() for _ in range(count)]
    whole = [weight.float() for weight in half[: max(2, count // 2)]]
    small = [torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8) for _ in range(2 * count)]
    scales = torch.ones(outputs).bfloat16()
    kinds: dict[str, list[Run]] = {
        "torch bf16": [partial(functional.linear, weight=weight) for weight in half],
        "torch fp32": [partial(_in_float, weight) for weight in whole],
        "torch int8": [partial(_in_bytes, weight, scales) for weight in small],
    }
    if native.built():
        kinds["heliostat bf16"] = [partial(native.linear, weight=weight) for weight in half]
    for batch in plan.batches:
        x = torch.randn(batch, inputs).bfloat16()
        for name, runs in kinds.items():
            found.setdefault(name, {})[batch] = seconds(runs, x, plan)
        if batch == 1:
            with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
                other = seconds(kinds["torch bf16"], x, plan)
            found["torch bf16"][1] = min(found["torch bf16"][1], other)
    return found


def coded(name: str, outputs: int, inputs: int, plan: Plan) -> dict[str, Any]:
    """Seconds by planes and batch, errors beside the plain twin, bytes of a product, rows that the kernel is used for."""
    weight = made(Format.parse(name), outputs, inputs)
    first = kernel.Packed(weight)
    packed = [first, *(first.again() for _ in range(plan.bytes // first.bytes))]
    found: dict[str, Any] = {
        "bytes": first.bytes,
        "rows": most_rows(weight.format, outputs, inputs),
        "1": {},
        "2": {},
    }
    x = torch.randn(8, inputs)
    want = x @ weight.dense(torch.float32).T
    for planes in (1, 2):
        got = first.product(x, planes=planes)
        found[f"error {planes}"] = float((got - want).norm() / want.norm())
        for batch in plan.batches:
            runs: list[Run] = [partial(own.product, planes=planes) for own in packed]
            if batch > 4:
                runs = runs[: max(8, len(runs) // batch)]
            x_half = torch.randn(batch, inputs).bfloat16()
            found[str(planes)][batch] = seconds(runs, x_half, plan)
    return found


def reading(plan: Plan) -> float:
    """Bytes a second that this machine reads from memory."""
    numbers = torch.ones(plan.bytes // 4)
    took = seconds([lambda _: numbers.sum()], numbers, plan)
    return 4 * numbers.numel() / took


def peers(plan: Plan) -> dict[str, dict[str, float]]:
    """What each peer that is there answers."""
    found = {}
    for name, variable in PEERS.items():
        where = os.environ.get(variable)
        if not where:
            continue
        python, _, file = where.rpartition(":")
        shapes = plan.shapes if name == "ggml" else plan.shapes[:2]
        batches = [b for b in plan.batches if b in (1, 4)]
        spec = {
            "where": file,
            "shapes": shapes,
            "batches": batches,
            "bytes": plan.bytes,
            "repeats": plan.repeats,
        }
        spec["threads"] = torch.get_num_threads()
        command = [python or sys.executable, "-P", kernel_peers.__file__, name, json.dumps(spec)]
        # An environment made for AQLM has no torch of its own: ours serves.
        more = {"PYTHONPATH": str(Path(torch.__file__).parents[1])} if name == "aqlm" else {}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, check=False, env=os.environ | more
        )
        if done.returncode:
            raise Refused(f"{name} ({variable}={where}) failed:\n{done.stderr[-2000:]}")
        found[name] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@torch.inference_mode()
def measure(plan: Plan, tell: Callable[[str], None] = print) -> dict[str, Any]:
    """Everything, shape by shape; no new shape is begun after ``plan.minutes``."""
    if not kernel.built():
        raise Refused(
            "the codebook kernel does not run here: it needs AVX-512 with VBMI and BF16, and a C++ compiler at install"
        )
    torch.manual_seed(0)
    end = time.monotonic() + 60 * plan.minutes
    found: dict[str, Any] = {"reading": reading(plan), "shapes": {}}
    tell("peers")
    answers = peers(plan)
    for outputs, inputs in plan.shapes:
        if time.monotonic() > end:
            break
        tell(f"{outputs} x {inputs}")
        found["shapes"][f"{outputs}x{inputs}"] = {
            "dense": dense(outputs, inputs, plan),
            "coded": {name: coded(name, outputs, inputs, plan) for name in plan.formats},
        }
    return {**found, "peers": answers, "plan": asdict(plan)}
