"""`heliostat bench` against a real `heliostat serve`: what the client counts is what the server counts, to the token.

HELIOSTAT_TRACES may name a folder of public traces, of which slices are then replayed.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from heliostat.bench.counting import Case, count
from heliostat.bench.logs import read_log
from heliostat.build import read_family
from tests.slow.process import MAIN, served

pytestmark = pytest.mark.slow

MEMBERS = ("solo", "math", "code", "plan")
LENGTHS = "--context 40 --role 8 --answer 6 --observation 8 --pause 0.02"


@pytest.fixture
def address(tiny_family_made: Path) -> Iterator[str]:
    # Room for all that is ever written: as many pages as so many requests could need.
    with served(tiny_family_made, "--cache-mib", "64", "--max-running", "512") as (found, _):
        yield found


def bench(*words: object) -> str:
    """Runs the command in a process of its own, as people do; what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "bench", *map(str, words)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def counters(address: str) -> dict[str, dict[str, float]]:
    """Counter -> member -> value, of the server's own metrics."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for family in text_string_to_metric_families(httpx2.get(f"{address}/metrics").text):
        for sample in family.samples:
            if family.name.startswith("heliostat_"):
                found[sample.name.removeprefix("heliostat_")][sample.labels.get("member", "")] += sample.value
    return found


def agree(results: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Requests, tokens and cached tokens of every member, to the last one."""
    told: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for run in results["runs"]:
        assert run["requests"]["outcomes"] == {"answered": run["requests"]["due"]}
        for member, sums in run["by_member"].items():
            for name, value in sums.items():
                told[member][name] += value
    names = {
        "request_success_total": "answered",
        "prompt_tokens_total": "prompt_tokens",
        "generation_tokens_total": "answer_tokens",
        "prefix_cache_hits_total": "cached_tokens",
    }
    assert set(told) == set(MEMBERS)
    for counter, name in names.items():
        for member in MEMBERS:
            grown = after[counter][member] - before.get(counter, {}).get(member, 0)
            assert grown == told[member][name], (counter, member)


def test_three_workflows_agree_with_the_server(address: str, tiny_family_made: Path, tmp_path: Path) -> None:
    family = read_family(tiny_family_made)
    weights = {module.name: module.weights for module in family.modules.values()}
    for place, workflow in enumerate(("react", "reflexion", "fanout")):
        before, out = counters(address), tmp_path / workflow
        words = (
            f"--url {address}/v1 --workflow {workflow} --members {','.join(MEMBERS)} --rate 4,8 --sessions 12"
        )
        words += f" --seed {place} --assignment draw --pass-as ids --keep-prompts {LENGTHS} --turns 2"
        said = bench("client", *words.split(), "--out", out)
        assert "report.html" in said
        after, results = counters(address), json.loads((out / "results.json").read_text(encoding="utf-8"))
        agree(results, before, after)
        assert after["evictions_total"][""] == 0, "else less is found than counted"
        # And what was found is what the family's rows allow, counted in the prompts that were sent.
        log = read_log(out / "requests.jsonl")
        case = Case("this family", {member: family.row(member) for member in log.members}, weights)
        (counted,) = count(log, [case])
        assert counted.cached == sum(run["hits"]["cached_tokens"] for run in results["runs"]) > 0
        assert counted.prompt == sum(run["hits"]["prompt_tokens"] for run in results["runs"])


def test_text_that_comes_back_agrees_too(address: str, tmp_path: Path) -> None:
    words = f"--url {address}/v1 --members {','.join(MEMBERS)} --rate 4 --sessions 10 --turns 1 --context 8 --role 3"
    words += " --answer 6 --observation 3 --pause 0.02 --assignment rotate --role-place kept"
    bench("client", *words.split(), "--out", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    agree(results, {}, counters(address))
    assert results["runs"][0]["requests"]["stand_ins"] == 0


@pytest.mark.skipif(
    "HELIOSTAT_TRACES" not in os.environ, reason="HELIOSTAT_TRACES: a folder of public traces"
)
def test_slices_of_traces(address: str, tmp_path: Path) -> None:
    for trace in sorted(Path(os.environ["HELIOSTAT_TRACES"]).iterdir()):
        before, out = counters(address), tmp_path / trace.name
        words = f"--url {address}/v1 --members {','.join(MEMBERS)} --pass-as ids --limit 120 --scale 0.005"
        words += " --max-length 250 --speed 20"
        bench("replay", "--trace", trace, *words.split(), "--out", out)
        agree(json.loads((out / "results.json").read_text(encoding="utf-8")), before, counters(address))
