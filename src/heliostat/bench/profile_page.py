"""Where an engine's time goes, as a page of tables and a picture. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from heliostat.plot import lines

Found = Mapping[str, Any]


def picture(results: Found) -> str:
    """What the second row costs, by batch."""
    series = {
        name: [(row["batch"], row["icarus"] / row["base"]) for row in found["decode"]]
        for name, found in results["shapes"].items()
    }
    return lines(
        {f"{name} parameters": points for name, points in series.items()},
        title="a step with a writer's and a speaker's row a request, beside one row",
        x="requests that decode",
        y="times as long",
        y_from_zero=True,
    )


def page(results: Found) -> str:
    """The tables."""
    birth = results["birth"]
    parts = [
        "# Where an engine's time goes",
        "",
        f"`{birth['command']}`; {birth['hardware']}; commit {birth['commit']}; {birth['date']}; Python {birth['python']}, "
        f"torch {birth['versions']['torch']}; medians of {birth['repeats']}, all in turn in one process.",
        "",
        "Random weights of a Llama's shape, bfloat16, greedy, random token ids. Reading memory reaches here "
        f"{results['bandwidth'] / 2**30:.1f} GiB/s, a large product {results['products'] / 1e9:.0f} GFLOP/s.",
    ]
    for name, found in results["shapes"].items():
        parts += ["", f"## {name} parameters", "", *_decode(found, results), "", *_prefill(found, results)]
        parts += ["", *_move(found)]
    parts += ["", "![What the second row costs](profile.svg)", ""]
    return "\n".join(parts)


def _decode(found: Found, results: Found) -> list[str]:
    birth = results["birth"]
    rows = []
    for row in found["decode"]:
        batch = row["batch"]
        floor = 1e3 * _floor(found, results, batch)
        rows.append(
            [
                batch,
                f"{row['base']:.2f}",
                f"{row['base'] / floor:.2f}x",
                f"{1 - row['base_blocks'] / row['base']:.0%}",
                f"{row['multilora']:.2f} ({row['multilora'] / row['base']:.2f}x)",
                f"{row['icarus']:.2f} ({row['icarus'] / row['base']:.2f}x)",
            ]
        )
    heads = ["batch", "one model, ms", "/ reading", "outside the blocks", "8 adapters, ms", "two rows, ms"]
    looped = next((row for row in found["decode"] if "multilora_loop" in row), None)
    more = []
    if looped:
        gains = [f"{looped[f'{n}_loop'] / looped[n]:.1f}" for n in ("multilora", "icarus")]
        more = [
            "",
            f"Operation by operation, without the compiled blocks, a step of {looped['batch']} requests takes "
            f"{looped['multilora_loop']:.1f} ms with an adapter a member ({gains[0]} times as long) and "
            f"{looped['icarus_loop']:.1f} ms with two rows a request ({gains[1]} times).",
        ]
    return [
        f"A decode step at {birth['context']} tokens of context; *reading* is one reading of weights, keys and values at "
        "the speed above, *outside the blocks* all but them: head, sampling, scheduling, Python. *8 adapters*: "
        f"{birth['members']} members in turn, each with its own on the one base. *two rows*: the base writes, a member's "
        "adapter asks, both rows in one pass. In brackets: against one model.",
        "",
        *_table(heads, rows),
        *more,
    ]


def _floor(found: Found, results: Found, batch: int) -> float:
    moved = found["bytes"] + batch * results["birth"]["context"] * found["token_bytes"]
    return float(moved / results["bandwidth"])


def _prefill(found: Found, results: Found) -> list[str]:
    rows = []
    for row in found["prefill"]:
        tokens, seconds = row["tokens"], row["seconds"]
        rate = 2 * found["parameters"] * tokens / seconds
        rows.append(
            [tokens, f"{1e3 * seconds:.1f}", f"{tokens / seconds:.0f}", f"{rate / results['products']:.0%}"]
        )
    return [
        "Prefill of one prompt; *of the product*: two operations a parameter and token beside a large product's rate, "
        "attention not counted.",
        "",
        *_table(["tokens", "ms", "tokens/s", "of the product"], rows),
    ]


def _move(found: Found) -> list[str]:
    seconds = {row["tokens"]: row["seconds"] for row in found["prefill"]}
    rows = [
        [
            row["tokens"],
            f"{row['bytes'] / 2**20:.1f}",
            f"{1e3 * row['lend']:.2f}",
            f"{1e3 * row['bring']:.2f}",
            f"{row['bytes'] / row['bring'] / 2**30:.2f}",
            f"{1e3 * seconds[row['tokens']]:.1f}",
            f"{seconds[row['tokens']] / (row['bring'] + row['lend']):.0f}x",
        ]
        for row in found["move"]
    ]
    heads = ["tokens", "MiB", "lend, ms", "bring, ms", "GiB/s", "compute, ms", "compute / move"]
    return [
        "A prompt's pages through shared memory beside computing them: *lend* is the SHA-256 of each page where they lie, "
        "*bring* the copy and the check.",
        "",
        *_table(heads, rows),
    ]


def _table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]
