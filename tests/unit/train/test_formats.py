"""Reading training data: five formats become one kind of record; every bad line is named with its reason."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.errors import Refused
from heliostat.train.formats import BadLine, Record, Turn, read_jsonl, scan

USER, ANSWER = Turn("user", "ask"), Turn("assistant", "say")
GOOD = {"prompt": "ask", "completion": "say"}


def write(path: Path, *lines: Any) -> Path:
    """Lines as they are where they are bytes, else as JSON."""
    file = path / "data.jsonl"
    file.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return file


def message(role: Any, content: Any = "x", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("item", "form", "turns", "plain"),
    [
        (
            {"messages": [message("user", "ask"), message("assistant", "say")]},
            "messages",
            [USER, ANSWER],
            False,
        ),
        (GOOD, "prompt/completion", [USER, ANSWER], True),
        (
            {"prompt": [message("user", "ask")], "completion": [message("assistant", "say")]},
            "prompt/completion",
            [USER, ANSWER],
            False,
        ),
        ({"instruction": "ask", "output": "say"}, "alpaca", [USER, ANSWER], True),
        ({"instruction": "ask", "input": "", "output": "say", "id": 7}, "alpaca", [USER, ANSWER], True),
        (
            {"instruction": "ask", "input": "it", "output": "say"},
            "alpaca",
            [Turn("user", "ask\nit"), ANSWER],
            True,
        ),
        (
            {"instruction": "ask", "output": "say", "system": "be", "history": [["ask", "say"]]},
            "alpaca",
            [Turn("system", "be"), USER, ANSWER, USER, ANSWER],
            False,
        ),
        (
            {"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "say"}]},
            "sharegpt",
            [USER, ANSWER],
            False,
        ),
        (
            {"system": "be", "conversations": [message("user", "ask"), message("assistant", "say")]},
            "sharegpt",
            [Turn("system", "be"), USER, ANSWER],
            False,
        ),
    ],
)
def test_formats(tmp_path: Path, item: Any, form: str, turns: list[Turn], plain: bool) -> None:
    found = read_jsonl(write(tmp_path, item, item))
    assert found.format == form
    assert [record.line for record in found.records] == [1, 2]
    assert found.records[0].turns == tuple(turns)
    assert found.records[0].plain == plain
    assert found.records[0].answer == "say"
    assert found.records[0].question == tuple(turns[:-1])


def test_text_records(tmp_path: Path) -> None:
    found = read_jsonl(write(tmp_path, {"text": "a story"}))
    assert (found.format, found.records[0].text, found.records[0].turns) == ("text", "a story", ())


def test_text_parts_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "sk"}]
    item = {"messages": [message("user", parts), message("assistant", "say")]}
    assert read_jsonl(write(tmp_path, item)).records[0].turns == (USER, ANSWER)


def test_answers_that_are_only_context(tmp_path: Path) -> None:
    turns = [message("user"), message("assistant", weight=0), message("user"), message("assistant", weight=1)]
    found = read_jsonl(write(tmp_path, {"messages": turns}))
    assert [turn.learned for turn in found.records[0].turns] == [True, False, True, True]
    turns = [message("user"), message("assistant", train=False), message("user"), message("assistant")]
    found = read_jsonl(write(tmp_path, {"messages": turns}))
    assert [turn.learned for turn in found.records[0].turns] == [True, False, True, True]


def test_answers_inside_a_prompt_are_context(tmp_path: Path) -> None:
    turns = [message("user"), message("assistant"), message("user"), message("assistant")]
    found = read_jsonl(write(tmp_path, {"prompt": turns[:3], "completion": turns[3:]}))
    assert [turn.learned for turn in found.records[0].turns] == [True, False, True, True]


def test_byte_order_mark_line_ends_and_blank_end(tmp_path: Path) -> None:
    file = write(tmp_path, b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r", GOOD, b"", b"  ")
    assert [record.line for record in read_jsonl(file).records] == [1, 2]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", "empty line"),
        (b'{"prompt": "a", ', "malformed JSON: .* at position"),
        (
            b'{"prompt": "a", "completion": "b", "prompt": "c"}',
            "malformed JSON: the key 'prompt' occurs twice",
        ),
        (b"nonsense", "malformed JSON: Expecting value at position 1"),
        (b'{"prompt": "\xff"}', "not UTF-8: byte 0xff at position 13"),
        (b"[" * 100_000, "malformed JSON"),
        ([1], "not a JSON object but a list.*jq -c"),
        (b"[", "malformed JSON.*jq -c"),
        ("x", "not a JSON object but a text"),
        (3, "not a JSON object but a number"),
        (None, "not a JSON object but null"),
        ({"completion": "b"}, "missing key 'prompt'; it has 'completion'"),
        ({"prompt": "a"}, "missing key 'completion'"),
        ({"prompt": "a", "completion": ""}, "empty completion"),
        ({"prompt": "a", "completion": " \n"}, "empty completion"),
        ({"prompt": "", "completion": "b"}, "empty prompt"),
        ({"prompt": 3, "completion": "b"}, "prompt must be a text, not a number"),
        ({"prompt": "a", "completion": None}, "completion must be a text, not null"),
        (
            {"prompt": "a\ud800", "completion": "b"},
            "prompt is no valid Unicode: half a surrogate pair at position 2",
        ),
    ],
)
def test_bad_lines(tmp_path: Path, line: Any, reason: str) -> None:
    file = write(tmp_path, GOOD, GOOD, line, GOOD)
    with pytest.raises(Refused, match=rf"1 of 4 lines cannot be used:\n  {file}:3: {reason}"):
        read_jsonl(file)
    found = read_jsonl(file, skip_bad=True)
    assert [record.line for record in found.records] == [1, 2, 4]
    assert [bad.line for bad in found.bad] == [3]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "'messages' is empty"),
        ("hello", "'messages' must be a list of messages, not a text"),
        (["hello"], "message 1 is not an object but a text"),
        ([message("user"), message("user")], "wrong role order: message 2 is 'user', not 'assistant'"),
        ([message("assistant")], "wrong role order: message 1 is 'assistant', not 'user'"),
        ([message("system")], "wrong role order: a system turn alone"),
        ([message("user"), message("system")], "wrong role order: message 2 is 'system'"),
        (
            [message("system"), message("assistant")],
            r"wrong role order: message 2 is 'assistant', not 'user'; it must be \[system\] user",
        ),
        ([message("user")], "no answer to learn: it ends with a user's turn"),
        (
            [message("user"), message("assistant", weight=0)],
            "no answer to learn: every assistant's turn has weight 0",
        ),
        ([message("user"), message("assistant", weight=0.5)], "message 2: weight is 0.5; only 0"),
        ([message("user"), message("tool")], "message 2 has role 'tool'; roles are system, user, assistant"),
        ([message("user"), message("assistant", tool_calls=[{}])], "message 2 has tool_calls"),
        ([message("user"), message("assistant", "")], "empty answer in message 2"),
        ([message("user"), message("assistant", None)], r"answer must be a text, not null \(message 2\)"),
        ([message("user"), {"role": "assistant"}], "message 2: missing key 'content'"),
        ([message("user"), {"content": "x"}], "message 2: missing key 'role'"),
        ([{"from": "human", "text": "x"}], "message 1: missing key 'value'"),
        ([message(["user"])], r"message 1 has role \['user'\]"),
    ],
)
def test_bad_conversations(tmp_path: Path, messages: Any, reason: str) -> None:
    good = {"messages": [message("user"), message("assistant")]}
    file = write(tmp_path, good, {"messages": messages})
    with pytest.raises(Refused, match=rf"{file}:2: {reason}"):
        read_jsonl(file)


@pytest.mark.parametrize("history", ["x", [["one"]], [1]])
def test_bad_history(tmp_path: Path, history: Any) -> None:
    item = {"instruction": "ask", "output": "say", "history": history}
    with pytest.raises(Refused, match=r":1: 'history' must be a list of \[question, answer\] pairs"):
        read_jsonl(write(tmp_path, item))


def test_unknown_format_says_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"keys are 'question', 'answer'; expected \{\"messages\": \[...\]\}"):
        read_jsonl(write(tmp_path, {"question": "a", "answer": "b"}))


def test_a_question_is_shown_with_what_came_before_it() -> None:
    turns = (Turn("system", "s"), Turn("user", "a"), Turn("assistant", "b"), Turn("user", "one more?"))
    assert Record(turns).asked == "[2 turns before] one more?"
    assert Record(turns[:2]).asked == Record(turns[:3]).asked == "a"


def test_first_line_of_a_format_decides(tmp_path: Path) -> None:
    found = scan(write(tmp_path, b"{", GOOD, {"text": "a story"}))
    assert found.format == "prompt/completion"
    assert [(bad.line, bad.reason.split(":")[0]) for bad in found.bad] == [
        (1, "malformed JSON"),
        (3, "missing key 'prompt'; it has 'text'"),
    ]
    assert "is read as prompt/completion because of its first line" in found.bad[1].reason
    assert "give several with --data" in found.bad[1].reason


def test_a_bad_line_of_the_files_own_format_is_not_blamed_on_another(tmp_path: Path) -> None:
    (bad,) = scan(write(tmp_path, {"text": "a story"}, {"text": 3, "prompt": "a"})).bad
    assert bad.reason == "text must be a text, not a number"


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_empty_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data.jsonl").write_bytes(content)
    for skip_bad in (False, True):
        with pytest.raises(Refused, match="data.jsonl is empty"):
            read_jsonl(tmp_path / "data.jsonl", skip_bad=skip_bad)


def test_nothing_left_is_refused_even_if_bad_lines_may_be_skipped(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="2 of 2 lines cannot be used"):
        read_jsonl(write(tmp_path, b"{", {"prompt": ""}), skip_bad=True)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"none.jsonl cannot be read: No such file"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(Refused, match="cannot be read: Is a directory"):
        read_jsonl(tmp_path)


def test_ten_bad_lines_are_shown(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD, *[{"prompt": "a"}] * 25)
    with pytest.raises(Refused) as refusal:
        read_jsonl(file)
    assert str(refusal.value).count("missing key") == 10
    assert f"{file}:11:" in str(refusal.value) and f"{file}:12:" not in str(refusal.value)
    assert "... and 15 more" in str(refusal.value)
    assert "--skip-bad" in str(refusal.value)


@pytest.mark.parametrize(
    "item",
    [
        {"prompt": "ask"},
        {"prompt": "ask", "completion": ""},
        {"prompt": "ask", "completion": "say"},
        {"instruction": "ask"},
        {"messages": [message("user", "ask")]},
        {"messages": [message("user", "ask"), message("assistant", "say")]},
        {"conversations": [{"from": "human", "value": "ask"}]},
    ],
)
def test_prompts_for_a_teacher(tmp_path: Path, item: Any) -> None:
    record = read_jsonl(write(tmp_path, item), prompts=True).records[0]
    assert record.turns == record.question == (USER,)
    assert record.answer is None


def test_prompts_keep_earlier_answers(tmp_path: Path) -> None:
    turns = [message("user", "ask"), message("assistant", "say"), message("user", "ask")]
    assert read_jsonl(write(tmp_path, {"messages": turns}), prompts=True).records[0].turns == (
        USER,
        ANSWER,
        USER,
    )


def test_a_text_is_no_prompt(tmp_path: Path) -> None:
    found = scan(write(tmp_path, {"text": "a story"}), prompts=True)
    assert found.bad == (BadLine(1, "a text has no prompt that could be answered"),)


@given(roles=st.lists(st.sampled_from(["system", "user", "assistant"]), min_size=1, max_size=7))
def test_role_order(tmp_path_factory: pytest.TempPathFactory, roles: list[str]) -> None:
    """A conversation is read if and only if it is [system] (user assistant)+."""
    letters = "".join(role[0] for role in roles)
    fits = letters.removeprefix("s") == "ua" * (len(letters) // 2) and len(letters) > 1
    found = scan(write(tmp_path_factory.mktemp("roles"), {"messages": [message(role) for role in roles]}))
    assert bool(found.records) == fits
    assert bool(found.bad) != fits


@given(raw=st.binary(max_size=200))
def test_any_bytes_are_records_or_bad_lines(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    file = tmp_path_factory.mktemp("any") / "data.jsonl"
    file.write_bytes(raw)
    found = scan(file)
    lines = raw.removeprefix(b"\xef\xbb\xbf").rstrip()
    assert len(found.records) + len(found.bad) == (lines.count(b"\n") + 1 if lines else 0)
