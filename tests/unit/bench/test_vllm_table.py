"""The table of systems on vLLM: what is started for each, and what is made of its points. Nothing is measured here."""

import os
from pathlib import Path
from typing import Any

import pytest

from heliostat.bench.vllm_page import HEADS, SYSTEMS, page, picture, rows_of
from heliostat.bench.vllm_table import (
    Load,
    client_words,
    cluster_of,
    machine_seconds,
    main,
    memory_mib,
    own_seconds,
    server_words,
    sessions_of,
    turns_of,
)

LOAD = Load(members=3, sessions=4, repeats=2, rounds=2, cache_mib=600)


def test_systems_differ_in_who_stands_where_and_have_the_same_pages_in_all() -> None:
    hosted = {
        system: [
            ("+".join(worker["roles"]), worker["modules"])
            for worker in cluster_of(system, LOAD, Path("FAM"))["workers"]
        ]
        for system in SYSTEMS
    }
    both, three = "prefill+decode", range(3)
    assert hosted == {
        "separate": [(both, [f"whole-{n}.own"]) for n in three],
        "adapters": [(both, ["base", *(f"adapted-{n}.own" for n in three)])],
        "icarus": [(both, ["base", *(f"streamed-{n}.own" for n in three)])],
        "prefillshare": [("prefill", ["base"]), ("decode", [f"spoken-{n}.own" for n in three])],
        "sun": [("prefill", [f"handed-{n}.own" for n in three]), ("decode", ["base"])],
    }
    for system in SYSTEMS:
        server = server_words(system, LOAD, Path("FAM"), Path("c.yaml"))
        assert int(server[server.index("--cache-mib") + 1]) * len(hosted[system]) == 600


def test_clients_ask_the_same_sessions_of_all_and_others_in_each_round() -> None:
    def facts(system: str, **more: Any) -> dict[str, str]:
        words = client_words(system, LOAD, **{"turn": 0, **more})[3:]
        return dict(zip(words[::2], words[1::2], strict=True))

    told = {system: facts(system) for system in SYSTEMS}
    assert {one["--seed"] for one in told.values()} == {"0"} and told["sun"]["--rate"] == "0.4,0.4"
    assert len({facts("sun", turn=turn, warm=warm)["--seed"] for turn in (0, 1) for warm in (0, 1)}) == 4
    order = [system for system, _ in turns_of(LOAD)]
    assert order[: len(SYSTEMS)] == order[: -len(SYSTEMS) - 1 : -1] == list(SYSTEMS)


def point(seconds: float, *, failed: bool = False) -> dict[str, Any]:
    run = {
        "goodput": {"share": {"value": 0.9}, "requests": 1.5},
        "throughput": {"answer_tokens": 40.0},
        "ttft": {"p50": {"value": 0.25}},
        "hits": {"ratio": {"value": 0.5}},
        "queue": {"grows": False},
    }
    sessions = {f"0/{n}": {"start": n, "end": n + seconds, "answered": not failed or n} for n in range(100)}
    return {"memory_mib": 1234, "others": 0.02, "runs": [run, run], "sessions": sessions}


def test_rows_are_of_all_points_of_a_system_and_ratios_of_the_same_sessions() -> None:
    points = {f"separate-{n}": point(4.0) for n in (0, 1)} | {f"icarus-{n}": point(2.0) for n in (0, 1)}
    separate, icarus = rows_of(points)
    assert (separate["runs"], separate["sessions"], separate["memory_mib"]) == (4, 200, 1234)
    assert icarus["session"]["p95"]["value"] == 2.0 and icarus["shorter"]["p95"]["value"] == 2.0
    text = page([separate, icarus], load=LOAD_FACTS, birth=BIRTH)
    assert (
        "| 1,234 | 90 % | 1.5 | 40 | 50 % | 0.25 |" in text
        and "Failed sessions: none" in text
        and "at most 2 % was for other programs" in text
    )
    assert all(line.count("|") == len(HEADS) + 1 for line in text.splitlines() if line.startswith("|"))
    assert "icarus, p95" in picture([separate, icarus])


def test_what_is_not_there_is_told() -> None:
    (separate,) = rows_of({"separate-0": point(4.0, failed=True)})
    assert separate["failed"] == 1 and "too few: 99 sessions of 200" in str(separate["session"]["p95"])
    text = page([separate], load=LOAD_FACTS, birth=BIRTH)
    assert "Failed sessions: 1 of separate" in text and "too few" in text


LOAD_FACTS = {"members": 3, "shape": "24M", "dtype": "bfloat16", "turns": 3, "rate": 0.5, "repeats": 2} | {
    "sessions": 4, "rounds": 2, "cache_mib": 600,
}  # fmt: skip
BIRTH = {"command": "c", "hardware": "h", "commit": "x", "date": "d"}


def test_a_session_is_from_its_first_call_to_its_last_answer() -> None:
    calls = [
        {"run": 0, "session": 1, "scheduled": 2.0, "end": 3.0, "outcome": "answered"},
        {"run": 0, "session": 1, "scheduled": 3.5, "end": 5.0, "outcome": "cut"},
    ]
    assert sessions_of(iter(calls)) == {"0/1": {"start": 2.0, "end": 5.0, "answered": False}}


def test_memory_is_of_the_whole_tree() -> None:
    assert memory_mib(os.getpid()) > 10 and memory_mib(2**22 + 1) == 0


def test_what_the_machine_did_is_parted_into_ours_and_others() -> None:
    before, own = machine_seconds(), own_seconds(os.getpid())
    sum(n * n for n in range(10**6))
    assert machine_seconds() >= before and own_seconds(os.getpid()) >= own > 0


def test_the_plan_is_told_and_nothing_runs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--plan", "--members", "2"])
    told = capsys.readouterr().out
    assert told.count("heliostat serve FAM") == told.count("heliostat bench client") == len(SYSTEMS)
