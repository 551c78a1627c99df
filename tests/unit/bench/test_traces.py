"""Traces: both formats are read, lengths and times hold, and what begins alike in a trace begins alike when replayed."""

import json
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from heliostat.bench.traces import HASHED, Conversations, Replay, Traced, read_trace, replayed
from heliostat.bench.workloads import prompt_ids
from heliostat.errors import Refused

LINES: list[dict[str, Any]] = [
    {"timestamp": 500, "input_length": 1030, "output_length": 20, "hash_ids": [0, 1, 2]},
    {"timestamp": 0, "input_length": 700, "output_length": 5, "hash_ids": [0, 9]},
    {"timestamp": 2500, "input_length": 1600, "output_length": 30, "hash_ids": [0, 1, 3, 4]},
]
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:17:03.9799600,4808,10\r\n2023-11-16 18:17:04.4799600,3180,8\r\n"
)


def written(folder: Path, text: str) -> Path:
    path = folder / "trace"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def mooncake(tmp_path: Path) -> Path:
    return written(tmp_path, "".join(json.dumps(line) + "\n" for line in LINES))


def test_mooncake_in_the_order_of_time(mooncake: Path) -> None:
    assert read_trace(mooncake) == [
        Traced(0.0, 700, 5, (0, 9)),
        Traced(0.5, 1030, 20, (0, 1, 2)),
        Traced(2.5, 1600, 30, (0, 1, 3, 4)),
    ]


def test_azure(tmp_path: Path) -> None:
    first, second = read_trace(written(tmp_path, AZURE))
    assert (first.prompt_tokens, first.answer_tokens, first.hashes) == (4808, 10, ())
    assert second.time == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello\n",
        '{"timestamp": 1}\n',
        '{"timestamp": 0, "input_length": 700, "output_length": 5, "hash_ids": [0]}\n',
        "TIMESTAMP,ContextTokens\r\n2023-11-16 18:17:03,4808\r\n",
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\nyesterday,1,2\r\n",
    ],
)
def test_what_is_neither_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(Refused, match=r"line \d|no request"):
        read_trace(written(tmp_path, text))
    with pytest.raises(Refused, match="cannot be read"):
        read_trace(tmp_path / "gone")


def test_prompts_begin_alike_as_far_as_their_hashes_do(mooncake: Path) -> None:
    made, left_out = replayed(read_trace(mooncake), Replay(members=("a", "b")))
    one, two, three = (prompt_ids(session.calls[0], {}) for session in made)
    assert (len(one), len(two), len(three), left_out) == (700, 1030, 1600, 0)
    assert two[: 2 * HASHED] == three[: 2 * HASHED] and one[:HASHED] == two[:HASHED]
    assert two[2 * HASHED :] != three[2 * HASHED : 1030] and one[HASHED:] != two[HASHED:700]
    assert [session.calls[0].answer_tokens for session in made] == [5, 20, 30]


def test_scale_speed_limit_and_length(mooncake: Path) -> None:
    trace = read_trace(mooncake)
    made, left_out = replayed(trace, Replay(members=("a",), speed=2, scale=0.1, limit=2))
    assert [session.start for session in made] == [0.0, 0.25] and left_out == 0
    assert [len(prompt_ids(session.calls[0], {})) for session in made] == [70, 103]
    made, left_out = replayed(trace, Replay(members=("a",), max_length=1050))
    assert len(made) == 2 and left_out == 1
    with pytest.raises(Refused, match="--scale"):
        replayed(trace, Replay(members=("a",), max_length=10))


def test_a_conversation_goes_on_from_all_whole_pieces_of_an_earlier_request() -> None:
    told = Conversations()
    assert told.of(Traced(0, 1030, 1, (0, 1, 2))) == (0, 0)
    assert told.of(Traced(1, 700, 1, (0, 9))) == (1, 0)
    assert told.of(Traced(2, 1600, 1, (0, 1, 3, 4))) == (0, 1)
    assert told.of(Traced(3, 2100, 1, (0, 1, 3, 5, 6))) == (0, 2)
    assert told.of(Traced(4, 600, 1, (0, 7))) == (2, 0), "a first piece is everybody's"
    assert told.of(Traced(5, 100, 1)) == (3, 0)


def test_members_by_conversation_or_by_request() -> None:
    trace = [Traced(n, 1024 + 512 * n, 1, tuple(range(2 + n))) for n in range(8)]
    trace += [Traced(100 + n, 2048, 1, (50 + 4 * n, 51 + 4 * n, 52 + 4 * n, 53 + 4 * n)) for n in range(400)]

    def members(**how: Any) -> list[str]:
        return [s.calls[0].member for s in replayed(trace, Replay(members=("a", "b"), scale=0.01, **how))[0]]

    assert all(one != other for one, other in pairwise(members(assignment="rotate")[:8]))
    assert len(set(members(assignment="cast")[:8])) == 1
    assert members(assignment="draw") == members(assignment="draw") != members(assignment="draw", seed=1)
    skewed = Counter(members(assignment="draw", popularity=3.0))
    assert skewed["a"] / skewed.total() == pytest.approx(8 / 9, abs=0.06)


@pytest.mark.skipif(
    "HELIOSTAT_TRACES" not in os.environ, reason="HELIOSTAT_TRACES: a folder of public traces"
)
def test_real_traces() -> None:
    for path in sorted(Path(os.environ["HELIOSTAT_TRACES"]).iterdir()):
        trace = read_trace(path)
        made, _ = replayed(trace, Replay(members=("a", "b", "c"), scale=0.02, limit=500))
        assert len(made) == min(500, len(trace)) and made[-1].start >= made[0].start >= 0
