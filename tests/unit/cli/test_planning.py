"""`plan` from the command line: tables, JSON, a report, a family's tokenizer and rows, and what is no log."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.conftest import Heliostat


def log(folder: Path, lines: list[dict[str, Any]]) -> Path:
    path = folder / "requests.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def turns(*roles: str) -> list[dict[str, Any]]:
    """Members of ``roles`` asked about one long context, their role in front of it."""
    return [
        {
            "time": n,
            "member": role,
            "messages": [
                {"role": "system", "content": f"{role}, that is you."},
                {"role": "user", "content": "one two three four five six seven " * 12},
            ],
            "answer_tokens": 8,
            "seconds": 0.5,
        }
        for n, role in enumerate(roles)
    ]


def test_tables_and_a_verdict(heliostat: Heliostat, tmp_path: Path) -> None:
    path = log(tmp_path, turns("math", "code", "plan"))
    said = heliostat("plan", "--logs", path, "--out", tmp_path / "out")
    assert "do not switch as it is; with instructions last it is worth a trial" in said.stdout
    assert "four bytes a token" in said.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["birth"]["commit"] and len(results["counted"]) == 4
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3 and "do not switch as it is" in page


def test_a_family_counts_exactly_and_by_its_rows(
    heliostat: Heliostat, tmp_path: Path, tiny_family_made: Path
) -> None:
    from heliostat.build import load_tokenizer, read_family

    asked = turns("math", "code", "plan")
    found = json.loads(
        heliostat("plan", "--logs", log(tmp_path, asked), "--family", tiny_family_made, "--json").stdout
    )
    tokenizer = load_tokenizer(tiny_family_made, read_family(tiny_family_made))
    exact = sum(len(tokenizer.prompt_ids(line["messages"])) for line in asked)
    assert found["balance"]["prompt_tokens"] == exact
    assert [counted["case"] for counted in found["counted"]][-1] == "this family"
    assert not found["moved"]["guessed"] and set(found["moved"]["roles"]) == {"math", "code", "plan"}
    strange = heliostat("plan", "--logs", log(tmp_path, turns("who")), "--family", tiny_family_made)
    assert "who: no members of" in strange.stderr and "do not switch: there is one member" in strange.stdout


def test_what_is_no_log_is_refused(heliostat: Heliostat, tmp_path: Path) -> None:
    path = log(tmp_path, [{"hello": 1}])
    assert "line 1: lacks 'time'" in heliostat("plan", "--logs", path, status=2).stderr
    assert "no request" in heliostat("plan", "--logs", path, "--skip-bad", status=2).stderr


def asked(count: int) -> list[dict[str, Any]]:
    """Requests with lengths, five a second, of two members."""
    return [
        {"time": n / 5, "member": "ab"[n % 2], "prompt_tokens": 300, "answer_tokens": 30}
        for n in range(count)
    ]


def test_workers_and_cost_on_a_gpu(heliostat: Heliostat, tmp_path: Path) -> None:
    path, out = log(tmp_path, asked(24)), tmp_path / "out"
    said = heliostat(
        "plan", "--logs", path, "--gpu", "h100-80", "--price", 2.5, "--model", "1b", "--out", out
    )
    assert "Workers on h100-80" in said.stdout and "assumed, not measured" in said.stderr
    fleet = json.loads((out / "results.json").read_text(encoding="utf-8"))["fleet"]
    apart = fleet["priced"][0]
    workers = sum(apart["sized"][role] for role in ("prefill", "decode", "both"))
    assert fleet["machine"] == "h100-80" and workers >= 1 and apart["per_hour"] == 2.5 * workers
    assert fleet["verdict"] in said.stdout and "Workers on h100-80" in (out / "report.html").read_text()


def test_workers_by_measured_costs(heliostat: Heliostat, tmp_path: Path) -> None:
    from heliostat.bench.costs import PARTS, Fitted

    about = {"shape": "24M", "threads": 1, "page_bytes": 1024}
    table = tmp_path / "costs.json"
    costs = Fitted(dict.fromkeys(PARTS, 1e-4) | {"pair": 0.0, "context": 0.0}, about=about)
    table.write_text(json.dumps(costs.to_json()), encoding="utf-8")
    path = log(tmp_path, asked(12))
    said = heliostat("plan", "--logs", path, "--costs", table)
    assert "Workers on 24M as measured here, 1 thread" in said.stdout and "do not switch" in said.stdout
    both = heliostat("plan", "--logs", path, "--costs", table, "--gpu", "h100-80", status=2)
    assert "leave out --gpu" in both.stderr


@pytest.fixture
def nodes(tmp_path: Path) -> Path:
    """Two GPUs that read, one that answers."""
    path = tmp_path / "nodes.yaml"
    machines = [
        {"name": "n1", "address": "10.0.0.1", "devices": 2, "memory": 40960, "roles": ["prefill"]},
        {"name": "n2", "address": "10.0.0.2", "memory": 40960, "roles": ["decode"]},
    ]
    path.write_text(json.dumps({"nodes": machines}))
    return path


def test_where_servers_fit_is_what_cluster_size_shows(
    heliostat: Heliostat, tmp_path: Path, tiny_family_made: Path, nodes: Path
) -> None:
    shown = heliostat("cluster", "size", tiny_family_made, "--nodes", nodes).stdout
    words = ["plan", "--family", tiny_family_made, "--nodes", nodes]
    assert heliostat(*words).stdout == shown and "prefill-0" in shown
    servers = json.loads(heliostat(*words, "--json").stdout)["servers"]
    assert {one["name"] for one in servers} == {
        word for word in shown.split() if word[-1:].isdigit() and "-" in word
    }
    path = log(tmp_path, turns("math", "code", "plan"))
    said = heliostat(*words, "--logs", path, "--gpu", "h100-80").stdout
    assert "vLLM servers" in said and "as simulated this family needs" in said and "on these nodes" in said
    assert "give --family" in heliostat("plan", "--nodes", nodes, status=2).stderr
    assert "--logs FILE is missing" in heliostat("plan", "--family", tiny_family_made, status=2).stderr


def test_what_cannot_be_planned_is_told(heliostat: Heliostat, tmp_path: Path) -> None:
    path = log(tmp_path, asked(4))
    assert "there is: a100-80" in heliostat("plan", "--logs", path, "--gpu", "b200", status=2).stderr
    poor = heliostat("plan", "--logs", path, "--gpu", "l40s-48", "--price", -1, status=2)
    assert "price is -1.0" in poor.stderr
    large = heliostat("plan", "--logs", path, "--gpu", "l40s-48", "--model", "70b", status=2)
    assert "takes 141 GB" in large.stderr
    for option in ("--price", "--ttft", "--stretch"):
        alone = heliostat("plan", "--logs", path, option, 9, status=2)
        assert f"{option} says nothing without a machine: give --gpu, or --costs" in alone.stderr
    other = tmp_path / "llama.json"
    other.write_text("{}", encoding="utf-8")
    strange = heliostat("plan", "--logs", path, "--gpu", "l40s-48", "--model", other, status=2)
    assert "give a config.json" in strange.stderr
    without = log(tmp_path, [{"time": n, "member": "a", "prompt_tokens": 9} for n in range(3)])
    assert (
        "how long answers were" in heliostat("plan", "--logs", without, "--gpu", "l40s-48", status=2).stderr
    )
