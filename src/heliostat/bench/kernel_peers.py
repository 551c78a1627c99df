"""Other people's low-bit products, each asked in a process of its own: ``kernel_peers.py ggml|aqlm JSON``; says seconds.

Knows nothing of heliostat, so that it runs with whatever interpreter has the peer. ggml is llama.cpp's library: all its
products of one rotation are one graph, as llama.cpp runs them. AQLM's is its numba kernel, called as AQLM calls it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

TYPES = {"Q4_0": 2, "Q2_K": 10, "IQ2_XXS": 16}
FLOAT = 0
QUANTIZED_ROWS = 64
TAKEN = 4
"""Of AQLM's weights in one turn: it is slow, and all of them would take minutes."""


class _Room(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("bare", ctypes.c_bool)]


def _ggml(folder: str) -> ctypes.CDLL:
    for name in ("libggml-base.so", "libggml-cpu.so"):
        found = next(iter(sorted(Path(folder).rglob(name))))
        library = ctypes.CDLL(str(found), mode=ctypes.RTLD_GLOBAL)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.ggml_init.argtypes, library.ggml_init.restype = [_Room], pointer
    for name, arguments in {
        "ggml_new_tensor_2d": [pointer, ctypes.c_int, number, number],
        "ggml_mul_mat": [pointer, pointer, pointer],
        "ggml_new_graph_custom": [pointer, ctypes.c_size_t, ctypes.c_bool],
        "ggml_get_data": [pointer],
    }.items():
        getattr(library, name).argtypes, getattr(library, name).restype = arguments, pointer
    library.ggml_build_forward_expand.argtypes = [pointer, pointer]
    library.ggml_graph_compute_with_ctx.argtypes = [pointer, pointer, ctypes.c_int]
    library.ggml_free.argtypes = [pointer]
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, *[number] * 3, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_row_size.argtypes, library.ggml_row_size.restype = [ctypes.c_int, number], ctypes.c_size_t
    library.ggml_cpu_init()
    return library


def ggml(spec: dict[str, Any]) -> dict[str, float]:
    """Median seconds of one product for "TYPE OUTPUTSxINPUTS BATCH"; a width that a type cannot have is left out."""
    import numpy as np

    library, found = _ggml(spec["where"]), {}
    for outputs, inputs in spec["shapes"]:
        some = np.random.default_rng(0).standard_normal((QUANTIZED_ROWS, inputs), np.float32)
        for name, kind in TYPES.items():
            if inputs % 256:
                continue
            row = library.ggml_row_size(kind, inputs)
            coded, ones = np.zeros(row * QUANTIZED_ROWS, np.uint8), np.ones(inputs, np.float32)
            places = (some.ctypes.data, coded.ctypes.data)
            library.ggml_quantize_chunk(kind, *places, 0, QUANTIZED_ROWS, inputs, ones.ctypes.data)
            whole = np.tile(coded, -(-outputs // QUANTIZED_ROWS))[: row * outputs]
            count = max(2, int(spec["bytes"] / whole.nbytes))
            for batch in spec["batches"]:
                seconds = _graph(library, kind, outputs, inputs, batch, whole, count, spec)
                found[f"{name} {outputs}x{inputs} {batch}"] = seconds
    return found


def _graph(
    library: ctypes.CDLL,
    kind: int,
    outputs: int,
    inputs: int,
    batch: int,
    whole: Any,
    count: int,
    spec: dict[str, Any],
) -> float:
    size = count * (whole.nbytes + 4 * outputs * batch + 4096) + (64 << 20)
    context = library.ggml_init(_Room(size, None, False))
    x = library.ggml_new_tensor_2d(context, FLOAT, inputs, batch)
    ctypes.memset(library.ggml_get_data(x), 0, 4 * inputs * batch)
    graph = library.ggml_new_graph_custom(context, count + 8, False)
    for _ in range(count):
        weight = library.ggml_new_tensor_2d(context, kind, inputs, outputs)
        ctypes.memmove(library.ggml_get_data(weight), whole.ctypes.data, whole.nbytes)
        library.ggml_build_forward_expand(graph, library.ggml_mul_mat(context, weight, x))
    seconds = []
    for _ in range(spec["repeats"] + 1):
        begin = time.perf_counter()
        library.ggml_graph_compute_with_ctx(context, graph, spec["threads"])
        seconds.append((time.perf_counter() - begin) / count)
    library.ggml_free(context)
    return statistics.median(seconds[1:])


def aqlm(spec: dict[str, Any]) -> dict[str, float]:
    """Median seconds of one product, 2 codes for 8 numbers as its models have, for "2x8 OUTPUTSxINPUTS 1"."""
    import torch

    place = importlib.util.spec_from_file_location("numba_kernel", spec["where"])
    assert place is not None and place.loader is not None
    kernel = importlib.util.module_from_spec(place)
    place.loader.exec_module(kernel)
    torch.set_num_threads(spec["threads"])
    found = {}
    for outputs, inputs in spec["shapes"]:
        count = max(2, int(spec["bytes"] / (outputs * inputs / 4)))
        x, books = torch.randn(1, inputs), torch.randn(2, 256, 1, 8)
        scales = torch.ones(outputs, 1, 1, 1)
        codes = [
            torch.randint(-128, 128, (inputs // 8, outputs, 2), dtype=torch.int8)
            for _ in range(min(count, 64))
        ]
        seconds = []
        for number in range(spec["repeats"] + 1):
            begin = time.perf_counter()
            for own in codes[:TAKEN] if number else codes[:1]:
                kernel.numba_gemm_lut(x, own, books, scales, None)
            seconds.append((time.perf_counter() - begin) / TAKEN)
            codes = codes[TAKEN:] + codes[:TAKEN]
        found[f"2x8 {outputs}x{inputs} 1"] = statistics.median(seconds[1:])
    return found


if __name__ == "__main__":
    print(json.dumps({"ggml": ggml, "aqlm": aqlm}[sys.argv[1]](json.loads(sys.argv[2]))))
