"""Policy is pure Python without tensors; the engine and the server name no paper and no tuning technique."""

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

from tests.house.source import SourceFile, imports, modules, written

POLICY = (
    "heliostat.errors",
    "heliostat.family",
    "heliostat.files",
    "heliostat.engine.request",
    "heliostat.engine.page_table",
    "heliostat.engine.idle",
    "heliostat.engine.prefixes",
    "heliostat.engine.scheduler",
    "heliostat.engine.batch",
    "heliostat.engine.step",
    "heliostat.engine.writing",
    "heliostat.engine.speculation.lengths",
    "heliostat.engine.speculation.ngram",
    "heliostat.engine.speculation.rule",
    "heliostat.engine.speculation.shadows",
    "heliostat.engine.speculation.wanted",
    "heliostat.bench.autoscaling",
    "heliostat.bench.compared",
    "heliostat.bench.comparison",
    "heliostat.bench.counting",
    "heliostat.bench.workers",
    "heliostat.bench.station",
    "heliostat.bench.sizing",
    "heliostat.bench.simulator",
    "heliostat.bench.reckoning",
    "heliostat.bench.machines",
    "heliostat.bench.layout",
    "heliostat.bench.fleet",
    "heliostat.bench.costs",
    "heliostat.bench.decoded",
    "heliostat.bench.logs",
    "heliostat.bench.measured",
    "heliostat.bench.parting",
    "heliostat.bench.planning",
    "heliostat.bench.records",
    "heliostat.bench.statistics",
    "heliostat.bench.systems",
    "heliostat.bench.traces",
    "heliostat.bench.workloads",
    "heliostat.engine.fixed",
    "heliostat.judging.choice",
    "heliostat.train.droprates",
    "heliostat.engine.store",
    "heliostat.engine.arrivals",
    "heliostat.clock",
    "heliostat.serve.http_facts",
    "heliostat.serve.http_layout",
    "heliostat.serve.http_line",
    "heliostat.serve.http_orders",
    "heliostat.serve.http_watch",
    "heliostat.serve.hosts",
    "heliostat.serve.nodes",
    "heliostat.serve.render",
    "heliostat.serve.protocol",
    "heliostat.serve.cluster",
    "heliostat.serve.router",
    "heliostat.serve.router_breaker",
    "heliostat.serve.router_costs",
    "heliostat.serve.router_places",
    "heliostat.serve.router_sets",
    "heliostat.serve.scaling",
    "heliostat.vllm.asked",
    "heliostat.vllm.launch",
    "heliostat.vllm.sealed",
    "heliostat.vllm.versions",
    "heliostat.vllm.wire",
)
MECHANISM = frozenset({"torch", "numpy", "transformers", "safetensors", "peft", "triton"})

NAMELESS = ("heliostat.engine", "heliostat.serve")
NAMES = frozenset(
    {"sun", "qsun", "prefillshare", "icarus", "paca", "dropbp", "selfjudge", "codegemm", "lora"}
)


def roads_to_mechanism(start: str, graph: Mapping[str, set[str]]) -> list[str]:
    """``a -> b -> torch`` for each way in which a module reaches a library of tensors by what it imports."""
    found: list[str] = []
    seen: set[str] = {start}
    waiting: list[tuple[str, ...]] = [(start,)]
    while waiting:
        road = waiting.pop()
        for target in sorted(graph[road[-1]]):
            if target.partition(".")[0] in MECHANISM:
                found.append(" -> ".join((*road, target)))
            elif target in graph and target not in seen:
                seen.add(target)
                waiting.append((*road, target))
    return found


def graph_of(known: Mapping[str, SourceFile]) -> dict[str, set[str]]:
    """What each module imports."""
    return {name: imports(file, known) for name, file in known.items()}


@cache
def own_graph() -> dict[str, set[str]]:
    return graph_of(modules())


def words(text: str) -> Iterator[str]:
    """Every word of names, strings and comments in lower case: ``LoRARoute`` has lora, route and loraroute.

    Underscores and capitals begin a word, and so does what they may begin together: names of papers are
    capitalised in every way there is.
    """
    for run in re.findall(r"[A-Za-z]+", text):
        pieces = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+", run)
        for start in range(len(pieces)):
            for stop in range(start + 1, len(pieces) + 1):
                yield "".join(pieces[start:stop]).lower()


def named_papers(known: Mapping[str, SourceFile]) -> list[str]:
    """Where the engine or the server says the name of a paper or of a tuning technique."""
    return [
        f"{file.name}:{number} {word}"
        for file in known.values()
        if any(f"{file.name}.".startswith(f"{package}.") for package in NAMELESS)
        for number, line in enumerate([file.path.stem, *file.text.splitlines()])
        for word in sorted(NAMES.intersection(words(line)))
    ]


def test_the_policy_files_are_where_they_were() -> None:
    assert set(POLICY) <= modules().keys()


@pytest.mark.parametrize("module", POLICY)
def test_policy_reaches_no_library_of_tensors(module: str) -> None:
    assert roads_to_mechanism(module, own_graph()) == []


def test_policy_runs_without_any_library_of_tensors_being_loaded() -> None:
    program = f"import sys, {', '.join(POLICY)}; print(*sorted({set(MECHANISM)!r} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_engine_and_server_name_no_paper_and_no_technique() -> None:
    assert named_papers(modules()) == []


@pytest.mark.parametrize(
    "line", ["import torch", "def f():\n    import numpy as np", "from transformers.cache_utils import Cache"]
)
def test_a_library_of_tensors_is_found_behind_other_modules(tmp_path: Path, line: str) -> None:
    known = written(
        tmp_path, {"family.py": "import heliostat.a", "a.py": "from heliostat.b import x", "b.py": line}
    )
    (road,) = roads_to_mechanism("heliostat.family", graph_of(known))
    assert road.startswith("heliostat.family -> heliostat.a -> heliostat.b -> ")


def test_libraries_without_tensors_and_their_namesakes_are_not(tmp_path: Path) -> None:
    known = written(
        tmp_path, {"family.py": "import os, torchless\nfrom heliostat.a import torch", "a.py": ""}
    )
    assert roads_to_mechanism("heliostat.family", graph_of(known)) == []


@pytest.mark.parametrize(
    "text",
    [
        "lora = 1",
        "def load_lora_weights(): ...",
        "class LoRARoute: ...",
        "class LoraRoute: ...",
        "x = PaCALinear",
        "# as SUN does it",
        '"""The ICaRus way."""',
        'kind = "prefillshare"',
        "is_qsun2 = True",
        "DropBP, SelfJudge",
        "from heliostat.linear.lora import Route",
    ],
)
def test_a_name_is_found_however_it_is_written(tmp_path: Path, text: str) -> None:
    assert named_papers(written(tmp_path, {"engine/a.py": text}))
    assert named_papers(written(tmp_path, {"engine/a.py": "", "serve/deep/er.py": text}))
    assert (
        named_papers(written(tmp_path, {"engine/a.py": "", "serve/deep/er.py": "", "train/a.py": text})) == []
    )


def test_a_file_that_is_named_so_is_found(tmp_path: Path) -> None:
    assert named_papers(written(tmp_path, {"engine/codegemm.py": "x = 1"})) == [
        "heliostat.engine.codegemm:0 codegemm"
    ]


@pytest.mark.parametrize(
    "text", ["# exploration on a sunny Sunday", "alpaca, capacity", "flora", "unsung = sunk"]
)
def test_words_that_only_contain_a_name_are_not(tmp_path: Path, text: str) -> None:
    assert named_papers(written(tmp_path, {"engine/a.py": text})) == []
