"""Evaluation asks as serving asks and counts what is right, item by item."""

import json
from pathlib import Path
from typing import Any

import pytest

from heliostat.errors import Refused
from heliostat.llm import LLM
from heliostat.train.evaluate import LONGEST_ANSWER, evaluate

QUESTIONS = [f"add {n} and {n}" for n in range(6)]


@pytest.fixture(scope="module")
def llm(tiny_family_made: Path) -> LLM:
    return LLM(tiny_family_made, members=["math", "solo"], dtype="float32", cache_mib=16)


@pytest.fixture(scope="module")
def said(llm: LLM) -> list[str]:
    """What math says to the questions."""
    return [a.text for a in llm.generate(QUESTIONS, member="math", max_tokens=LONGEST_ANSWER)]


def write(path: Path, *items: Any) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def test_right_answers_are_counted_item_by_item(llm: LLM, said: list[str], tmp_path: Path) -> None:
    references = [said[0], "wrong", said[2], said[3], "wrong", "wrong"]
    items = ({"prompt": q, "completion": r} for q, r in zip(QUESTIONS, references, strict=True))
    found = evaluate(llm, "math", write(tmp_path / "d.jsonl", *items), metric="exact")
    assert [item.prompt for item in found.items] == QUESTIONS
    assert [item.answer for item in found.items] == said
    assert [item.reference for item in found.items] == references
    right = [bool(said[n].strip()) for n in (0, 2, 3)]
    assert [item.right for item in found.items] == [right[0], False, *right[1:], False, False]
    assert found.accuracy == sum(right) / 6
    facts = {"metric": "exact", "accuracy": round(found.accuracy, 4), "items": 6, "cut": found.cut}
    assert found.facts == facts
    assert (found.member, found.metric) == ("math", "exact")


def test_of_a_limit_the_first_are_taken(llm: LLM, tiny_data: Path) -> None:
    found = evaluate(llm, "math", tiny_data, metric="contains", limit=2)
    assert [item.prompt for item in found.items] == ["add 0 and 0", "add 0 and 1"]


def test_of_a_conversation_the_last_answer_is_asked_for(llm: LLM, tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "what was never said"},
        {"role": "user", "content": "add 1 and 2"},
        {"role": "assistant", "content": "3"},
    ]
    found = evaluate(llm, "solo", write(tmp_path / "d.jsonl", {"messages": turns}), metric="exact")
    (item,) = found.items
    expected = llm.generate([turns[:3]], member="solo", max_tokens=LONGEST_ANSWER)[0].text
    assert (item.prompt, item.answer, item.reference) == ("[2 turns before] add 1 and 2", expected, "3")


def test_a_prompt_may_fill_all_but_one_token(llm: LLM, tmp_path: Path) -> None:
    beside = {"prompt": "hello", "completion": "x"}
    frame = len(llm.prompt_ids(""))
    fits, over = ("!" * (llm.engine.max_length - frame - spare) for spare in (1, 0))
    assert len(llm.prompt_ids(fits)) == llm.engine.max_length - 1
    found = evaluate(
        llm,
        "math",
        write(tmp_path / "a.jsonl", {"prompt": fits, "completion": "x"}, beside),
        metric="exact",
    )
    alone = evaluate(llm, "math", write(tmp_path / "b.jsonl", beside), metric="exact")
    assert found.items[1] == alone.items[0]  # the long one took nothing from it
    with pytest.raises(Refused, match="256 tokens .* more than max_length 255"):
        evaluate(
            llm, "math", write(tmp_path / "c.jsonl", {"prompt": over, "completion": "x"}), metric="exact"
        )


def test_what_cannot_be_graded(llm: LLM, tmp_path: Path, tiny_data: Path) -> None:
    texts = write(tmp_path / "texts.jsonl", {"text": "one two three"})
    with pytest.raises(Refused, match=r"texts.jsonl holds texts without prompts"):
        evaluate(llm, "math", texts, metric="exact")
    with pytest.raises(Refused, match="metric"):
        evaluate(llm, "math", tiny_data, metric="exakt", limit=1)
    with pytest.raises(Refused, match="no member 'base' is loaded"):
        evaluate(llm, "base", tiny_data, metric="exact", limit=1)
