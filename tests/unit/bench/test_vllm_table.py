"""The table of systems on vLLM: what is started for each, and what is made of its runs. Nothing is measured here."""

from pathlib import Path

import pytest

from heliostat.bench.vllm_table import NAMES, Load, cluster_of, main, memory_mib, page, row_of, words_of

LOAD = Load("24M", members=3, rate=0.5, sessions=4, repeats=2, seed=0, cache_mib=600)


def test_systems_differ_in_who_stands_where_and_have_the_same_pages_in_all() -> None:
    hosted = {
        system: [worker["modules"] for worker in cluster_of(system, LOAD, Path("FAM"))["workers"]]
        for system in NAMES
    }
    assert hosted["separate"] == [["whole-0.own"], ["whole-1.own"], ["whole-2.own"]]
    assert hosted["adapters"] == [["base", "adapted-0.own", "adapted-1.own", "adapted-2.own"]]
    assert hosted["family"] == [["base", "streamed-0.own", "streamed-1.own", "streamed-2.own"]]
    for system in NAMES:
        server, client = words_of(system, LOAD, Path("FAM"), Path("c.yaml"))
        each = int(server[server.index("--cache-mib") + 1])
        assert each * len(hosted[system]) == 600
        assert client[client.index("--rate") + 1] == "0.5,0.5"


def test_a_row_is_of_medians_and_holes_stay_holes() -> None:
    runs = [
        {
            "goodput": {"share": {"value": share}, "requests": 1.0},
            "session": {"p95": {"value": 2.0}},
            "throughput": {},
        }
        for share in (0.5, 0.9, 1.0)
    ]
    row = row_of("family", runs, 1234.4)
    assert (row["goodput"], row["session_p95"], row["answer_tokens"], row["memory_mib"]) == (
        0.9,
        2.0,
        None,
        1234,
    )
    text = page([row], LOAD, {"command": "c", "hardware": "h", "commit": "x", "date": "d"})
    assert "| one vLLM server, the family in two streams | 1.23e+03 | 0.9 | 1 | 2 | - | - |" in text


def test_memory_is_of_the_whole_tree() -> None:
    import os

    assert memory_mib(os.getpid()) > 10 and memory_mib(2**22 + 1) == 0


def test_the_plan_is_told_and_nothing_runs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--plan", "--members", "2"])
    told = capsys.readouterr().out
    assert told.count("heliostat serve FAM") == 3 and told.count("heliostat bench client") == 3
