"""A trace through systems, as fast as it goes: what is shared is found, and the page tells the source."""

import json
from pathlib import Path

import pytest

from heliostat.bench import replaying


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Two conversations of three turns, each turn one whole piece longer."""
    asked = [
        {
            "timestamp": 1000 * turn + talk,
            "input_length": 512 * (turn + 2) + 16,
            "output_length": 20,
            "hash_ids": [*(100 * talk + n for n in range(turn + 2)), 1000 * talk + turn],
        }
        for turn in range(3)
        for talk in (1, 2)
    ]
    path = tmp_path / "mooncake_conversation.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in asked), encoding="utf-8")
    return path


def test_sharing_finds_what_another_member_read(trace: Path, tmp_path: Path) -> None:
    options = ["--members", "3", "--repeats", "1", "--scale", "0.0625", "--systems", "independent,icarus"]
    replaying.main([str(trace), *options, "--pages", "512", "--docs", str(tmp_path)])
    results = json.loads((tmp_path / "replay.json").read_text())
    found = results["traces"]["mooncake_conversation"]
    assert found["licence"] == "Apache-2.0" and found["requests"] == 6 and found["conversations"] == 2
    alone, shared = found["systems"]["independent"], found["systems"]["icarus"]
    assert alone["hits"] == 0.0, "every turn is another member's"
    assert alone["prompt_tokens"] == shared["prompt_tokens"] == 2 * (65 + 97 + 129)
    assert shared["hits"] == pytest.approx((64 + 96) / (65 + 97 + 129)), "the whole pieces of the turn before"
    page = (tmp_path / "replay.md").read_text()
    assert "Mooncake" in page and "made up" in page and str(tmp_path) not in page
