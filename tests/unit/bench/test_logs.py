"""Logs: every form of a line is read, ours and the server's, and what is none is refused with its line."""

import json
from pathlib import Path
from typing import Any

import pytest

from heliostat.bench.logs import pack, read_log, seconds_of, spelled, tokens_in
from heliostat.errors import Refused

TURNS = [{"role": "system", "content": "You plan."}, {"role": "user", "content": "the task"}]


def written(folder: Path, *lines: Any) -> Path:
    path = folder / "requests.jsonl"
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), "utf-8")
    return path


def line(**facts: Any) -> dict[str, Any]:
    return {"time": 1, "member": "a", "prompt": [1, 2, 3], **facts}


def test_ids_text_messages_and_lengths(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        line(time="2026-11-21T10:00:01Z", answer=[4, 5], seconds=0.5, role_tokens=2),
        line(time="2026-11-21T10:00:00Z", prompt="what a prompt", answer_tokens=7, answer="so"),
        "",
        {"time": "2026-11-21T10:00:02", "member": "b", "messages": TURNS},
        {"time": "2026-11-21T10:00:03", "member": "b", "prompt_tokens": 9, "cached_tokens": 4},
    )
    log = read_log(path)
    text, ids, turns, bare = log.requests
    assert (ids.prompt, ids.prompt_tokens, ids.answer_tokens, ids.role) == (pack([1, 2, 3]), 3, 2, 8)
    assert (text.prompt, text.kind, text.answer_tokens, text.answer) == (b"what a prompt", "text", 7, b"so")
    assert text.prompt_tokens == tokens_in(b"what a prompt") == 4
    assert turns.prompt == spelled(TURNS).encode() and turns.role == len(b"<|system|>\nYou plan.<|end|>\n")
    assert (bare.prompt, bare.prompt_tokens, bare.cached_tokens) == (None, 9, 4)
    assert log.members == ("a", "b") and not log.with_prompts and log.as_text


def test_a_growing_conversation_begins_with_what_was_asked_and_said() -> None:
    later = [*TURNS, {"role": "assistant", "content": "done"}, {"role": "user", "content": "more"}]
    assert spelled(later).startswith(spelled(TURNS) + "done")


def test_the_tokens_of_a_tokenizer(tmp_path: Path) -> None:
    path = written(tmp_path, line(prompt="abc", answer="d"), {"time": 2, "member": "a", "messages": TURNS})

    def tokenize(asked: Any) -> list[int]:
        return list(asked.encode()) if isinstance(asked, str) else list(spelled(asked).encode())

    first, second = read_log(path, tokenize=tokenize).requests
    assert (first.prompt, first.answer, first.kind) == (pack(list(b"abc")), pack(list(b"d")), "ids")
    assert second.role is not None
    assert second.prompt_tokens == len(spelled(TURNS))
    # Up to where the same instructions go on with another text: also the head of the user's turn.
    assert second.role // 4 == len("<|system|>\nYou plan.<|end|>\n<|user|>\n")


def test_the_log_of_our_server(tmp_path: Path) -> None:
    served = {"time": "2026-11-21T10:00:05Z", "event": "request", "member": "a@v2", "seconds": 1.5}
    served |= {"prompt_tokens": 30, "cached_tokens": 16, "completion_tokens": 4}
    log = read_log(written(tmp_path, {"time": "2026-11-21T10:00:00Z", "event": "listening"}, served))
    (found,) = log.requests
    assert (found.member, found.prompt_tokens, found.cached_tokens, found.answer_tokens) == ("a", 30, 16, 4)
    assert found.time == seconds_of("2026-11-21T10:00:03.5Z") and found.seconds == 1.5
    assert (log.source, log.others, log.with_prompts) == ("server", 1, False)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("hello", "Expecting value"),
        ("[1]", "no JSON object"),
        ({"member": "a", "prompt": [1]}, "lacks 'time'"),
        (line(time="noon"), "noon"),
        (line(member=""), "member is"),
        (line(prompt=[-1]), "token ids"),
        (line(prompt=["x"]), "token ids"),
        ({"time": 1, "member": "a"}, "lacks 'prompt'"),
        (line(answer_tokens=-1), "answer_tokens"),
        ({"time": 1, "member": "a", "messages": [{"content": "x"}]}, "lacks 'role'"),
    ],
)
def test_a_line_that_is_no_request_is_refused_or_left_out(tmp_path: Path, bad: Any, why: str) -> None:
    path = written(tmp_path, line(), bad, line())
    with pytest.raises(Refused, match="line 2") as refusal:
        read_log(path)
    assert why in str(refusal.value) and "--skip-bad" in str(refusal.value)
    log = read_log(path, skip_bad=True)
    assert (len(log.requests), log.skipped) == (2, 1)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no request"):
        read_log(written(tmp_path, ""))
    with pytest.raises(Refused, match="cannot be read"):
        read_log(tmp_path / "gone")
