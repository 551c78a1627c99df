"""Tools: calls found in what is said, however it is cut into pieces; templates that can show tools."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.errors import Refused
from heliostat.model.tokenizer import Tokenizer
from heliostat.serve.tools import Caller, turn
from heliostat.serve.trouble import Trouble

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def heard(pieces: list[str], *, listening: bool = True) -> tuple[str, list[tuple[str, Any]]]:
    caller = Caller(listening)
    text = "".join(caller.push(piece, last=place == len(pieces) - 1)[0] for place, piece in enumerate(pieces))
    return text, [(call.name, json.loads(call.arguments)) for call in caller.calls]


@pytest.mark.parametrize(
    ("said", "text", "calls"),
    [
        ("hello", "hello", []),
        (CALL, "", [("add", {"a": 1})]),
        (f"I add.\n{CALL}\n{CALL}", "I add.", [("add", {"a": 1})] * 2),
        ("a < b <tool", "a < b <tool", []),
        ("<tool_call>{broken</tool_call> x", "<tool_call>{broken</tool_call> x", []),
        ("<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
        ('<tool_call>{"name": "add"', '<tool_call>{"name": "add"', []),
        ('<tool_call>{"name": "now"}</tool_call>', "", [("now", {})]),
    ],
)
def test_calls_are_found_however_an_answer_is_cut(said: str, text: str, calls: list[Any]) -> None:
    assert heard([said]) == (text, calls)
    one_by_one, found = heard(list(said))
    assert found == calls and one_by_one.rstrip("\n") == text.rstrip("\n")


def test_without_tools_all_is_text() -> None:
    assert heard([CALL], listening=False) == (CALL, [])


@given(st.lists(st.sampled_from(["<", "tool_call>", "</", "<tool_call>", "</tool_call>", "{}", "a", "\n"])))
def test_nothing_is_lost_where_there_is_no_call(pieces: list[str]) -> None:
    assert heard([*pieces, ""]) == ("".join(pieces), [])


@pytest.fixture
def templated(tokenizer_folder: Callable[..., Path]) -> Tokenizer:
    """A tokenizer whose template shows tools."""
    template = (
        "{% if tools %}tools: {% for t in tools %}{{ t.function.name }} {% endfor %}{% endif %}"
        "{% for m in messages %}<|start|>{{ m.role }}: {{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments.a }}{% endfor %}<|end|>{% endfor %}"
    )
    return Tokenizer.load(tokenizer_folder(template=template))


def test_a_template_shows_tools_and_calls(templated: Tokenizer) -> None:
    said = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 7}'}}]}
    rendered = templated.render([turn(said, 0)], tools=[TOOL])
    assert rendered.startswith("tools: add ") and "7<|end|>" in rendered
    assert not templated.render([turn(said, 0)]).startswith("tools")


def test_a_template_without_a_place_for_tools_is_refused(tokenizer_folder: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.load(tokenizer_folder(template="growing"))
    with pytest.raises(Refused, match="^tools cannot be shown: .* no place for them"):
        tokenizer.render([{"role": "user", "content": "hello"}], tools=[TOOL])


def test_contents_are_texts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert turn({"role": "user", "content": parts}, 0)["content"] == "a\nb"
    assert turn({"role": "user"}, 0)["content"] == ""
    wrong: list[Any] = [[{"type": "image_url", "image_url": {"url": "x"}}], [{"type": "text"}], [{}]]
    for content in wrong:
        with pytest.raises(Trouble, match="only text is read"):
            turn({"role": "user", "content": content}, 3)


@pytest.mark.parametrize("call", [{}, {"function": "add"}, {"function": {"arguments": "{"}}])
def test_calls_that_are_none(call: Any) -> None:
    with pytest.raises(Trouble) as found:
        turn({"role": "assistant", "tool_calls": [call]}, 1)
    assert found.value.param == "messages.1.tool_calls"
