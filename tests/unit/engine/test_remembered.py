"""Answers that return as text: put in with the ids that were said, and never another text than the plain one."""

import random
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.engine.remembered import Recalls, Remembered
from heliostat.llm import LLM
from heliostat.model.tokenizer import Tokenizer

TEMPLATES = {
    "growing": "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}",
    "loose": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "trimming": "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content | trim }}<|end|>\n{% endfor %}",
    "upper": "{% for m in messages %}<|start|>{{ m.content | upper }}<|end|>{% endfor %}",
    "twice": "{% for m in messages %}<|start|>{{ m.content }}{{ m.content }}<|end|>{% endfor %}",
    "forgetful": "{% for m in messages[-2:] %}<|start|>{{ m.content }}<|end|>{% endfor %}",
    "numbers": "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content | int }}"
    "{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}",
}


@pytest.fixture(scope="module", params=["bytes", "spaced"])
def kind(request: pytest.FixtureRequest) -> bool:
    return request.param == "spaced"


@pytest.fixture(scope="module")
def tokenizers(tokenizer_folder: Callable[..., Path], kind: bool) -> dict[str, Tokenizer]:
    return {
        name: Tokenizer.load(tokenizer_folder(template=template, spaced=kind))
        for name, template in TEMPLATES.items()
    }


def spelled(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text letter by letter, as no tokenizer would."""
    return [token for letter in text for token in tokenizer.encode_on(letter)]


def talk(*contents: str) -> list[dict[str, str]]:
    """A conversation that the user begins."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


def test_an_answer_stands_as_it_was_said_and_all_around_as_ever(tokenizers: Mapping[str, Tokenizer]) -> None:
    tokenizer, memory = tokenizers["growing"], Remembered()
    said, end = spelled(tokenizer, "hello world"), tokenizer.eos_ids[0]
    assert said != tokenizer.encode_on("hello world")
    memory.remember(tokenizer, "hello world", [*said, end])
    turns = talk("hello world", "hello world", "and?")
    first = tokenizer.prompt_ids(turns[:1])
    ids = memory.prompt_ids(tokenizer, turns)
    assert ids[: len(first) + len(said) + 1] == [*first, *said, end]
    assert tokenizer.decode(ids) == tokenizer.decode(
        tokenizer.prompt_ids(turns)
    ) and ids != tokenizer.prompt_ids(turns)
    assert memory.recalls == Recalls(looked_up=1, spliced=1, differing=1)
    again = talk("hello world", "hello world", "and?", "hello world", "x")
    assert memory.prompt_ids(tokenizer, again)[: len(ids)] == ids
    assert memory.recalls == Recalls(looked_up=3, spliced=3, differing=3)


def test_as_the_tokenizer_spells_it_is_no_difference(tokenizers: Mapping[str, Tokenizer]) -> None:
    tokenizer, memory = tokenizers["growing"], Remembered()
    memory.remember(tokenizer, "hello", tokenizer.encode_on("hello"))
    turns = talk("a", "hello", "b")
    assert memory.prompt_ids(tokenizer, turns) == tokenizer.prompt_ids(turns)
    assert memory.recalls == Recalls(looked_up=1, spliced=1)


@pytest.mark.parametrize("template", ["upper", "twice", "forgetful", "numbers"])
def test_where_the_template_rewrites_it_is_the_plain_one(
    template: str, tokenizers: Mapping[str, Tokenizer]
) -> None:
    tokenizer, memory = tokenizers[template], Remembered()
    memory.remember(tokenizer, "hello", spelled(tokenizer, "hello"))
    turns = talk("a", "hello", "b", "c", "d")
    assert memory.prompt_ids(tokenizer, turns) == tokenizer.prompt_ids(turns)
    assert memory.recalls == Recalls(looked_up=2, unfit=1)


def test_one_answer_that_is_rewritten_does_not_spoil_the_others(tokenizers: Mapping[str, Tokenizer]) -> None:
    tokenizer, memory = tokenizers["trimming"], Remembered()
    for text in ("world", "hello\n"):
        memory.remember(tokenizer, text, spelled(tokenizer, text))
    turns = talk("a", "hello\n", "b", "world", "c")
    assert memory.prompt_ids(tokenizer, turns) != tokenizer.prompt_ids(turns)
    assert memory.recalls == Recalls(looked_up=2, spliced=1, differing=1, unfit=1)


def test_tenants_and_roles_are_apart_and_parts_are_left_alone(tokenizers: Mapping[str, Tokenizer]) -> None:
    tokenizer, memory = tokenizers["growing"], Remembered()
    memory.remember(tokenizer, "world", spelled(tokenizer, "world"), salt="one")
    turns: list[dict[str, Any]] = [*talk("world", "world", "b"), {"role": "assistant", "content": ["world"]}]
    plain = tokenizer.prompt_ids(turns)
    assert memory.prompt_ids(tokenizer, turns) == memory.prompt_ids(tokenizer, turns, salt="two") == plain
    assert memory.recalls == Recalls(looked_up=2)
    assert memory.prompt_ids(tokenizer, turns, salt="one") != plain


def test_what_says_more_than_its_text_is_not_kept(tokenizers: Mapping[str, Tokenizer]) -> None:
    tokenizer, memory = tokenizers["growing"], Remembered()
    ids = spelled(tokenizer, "hello")
    memory.remember(tokenizer, "hell", ids)  # a stop string cut it
    memory.remember(tokenizer, "", [tokenizer.eos_ids[0]])
    memory.remember(tokenizer, "hello", [tokenizer.encode("<|start|>")[0], *ids])  # a special token within
    assert memory.tokens == 0


def test_the_longest_unused_is_forgotten(tokenizers: Mapping[str, Tokenizer]) -> None:
    tokenizer, memory = tokenizers["growing"], Remembered(limit=12)
    for text in ("hello", "world", "hello"):
        memory.remember(tokenizer, text, spelled(tokenizer, text))
    assert memory.tokens == 10
    memory.remember(tokenizer, "today", spelled(tokenizer, "today"))
    memory.remember(tokenizer, "h" * 13, spelled(tokenizer, "h" * 13))
    memory.prompt_ids(tokenizer, talk("a", "hello", "b", "world", "c", "today"))
    assert memory.recalls.spliced == 2 and memory.tokens == 10


def test_many_threads_may_remember_and_ask(tokenizers: Mapping[str, Tokenizer], monkeypatch: Any) -> None:
    tokenizer, memory, words = tokenizers["growing"], Remembered(limit=12), ["hello", "world", "today"]
    said = {word: spelled(tokenizer, word) for word in words}
    monkeypatch.setattr(Tokenizer, "render", staticmethod(_rendered_at_once))
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(60):
            word = chance.choice(words)
            memory.remember(tokenizer, word, said[word])
            turns = talk("a", *(chance.choice(words) for _ in range(5)))
            ids = memory.prompt_ids(tokenizer, turns)
            plain = tokenizer.encode(_rendered_at_once(turns))
            assert tokenizer.decode(ids, skip_special=False) == tokenizer.decode(plain, skip_special=False)

    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
    finally:
        sys.setswitchinterval(before)
    assert memory.tokens == sum(map(len, memory._ids.values())) <= 12
    assert memory.recalls.looked_up == 8 * 60 * 3 and memory.recalls.spliced > 0


def _rendered_at_once(messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """A template without a thread of its own for each call."""
    return "".join(f"<|start|>{m['role']}\n{m['content']}<|end|>\n" for m in messages)


def test_tools_that_a_template_shows_stand_in_the_prompt(tokenizer_folder: Callable[..., Path]) -> None:
    template = "{% for t in tools or [] %}{{ t.name }} {% endfor %}" + TEMPLATES["growing"]
    tokenizer, memory = Tokenizer.load(tokenizer_folder(template=template)), Remembered()
    memory.remember(tokenizer, "world", spelled(tokenizer, "world"))
    turns = talk("hello", "world", "you")
    plain, shown = (memory.prompt_ids(tokenizer, turns, tools=tools) for tools in ([], [{"name": "add"}]))
    text = tokenizer.decode(shown, skip_special=False)
    assert text == "add " + tokenizer.decode(plain, skip_special=False)
    assert memory.recalls.spliced == 2, "the answer is found with tools, too"


WORDS = st.sampled_from(
    ["hello", "5", "the sum of 2", "\n", " ", "grüße", "中😀", "<|end|>", "QQ1X", "QQ", "<|start|>"]
)
TEXTS = st.lists(WORDS, max_size=4).map("".join)


@given(
    contents=st.lists(TEXTS, min_size=1, max_size=7),
    said=st.sets(st.integers(0, 6)),
    template=st.sampled_from(sorted(TEMPLATES)),
    seed=st.integers(0, 99),
)
def test_the_text_is_always_the_plain_one(
    contents: Sequence[str],
    said: set[int],
    template: str,
    seed: int,
    tokenizers: Mapping[str, Tokenizer],
) -> None:
    tokenizer, memory, chance = tokenizers[template], Remembered(), random.Random(seed)
    turns = talk(*contents)
    plain = tokenizer.prompt_ids(turns)
    assert memory.prompt_ids(tokenizer, turns) == plain
    for number in said:
        if number < len(contents):
            text, cut = contents[number], chance.randrange(9)
            memory.remember(tokenizer, text, tokenizer.encode_on(text[:cut]) + spelled(tokenizer, text[cut:]))
    ids = memory.prompt_ids(tokenizer, turns)
    assert tokenizer.decode(ids, skip_special=False) == tokenizer.decode(plain, skip_special=False)
    recalls = memory.recalls
    assert recalls.differing <= recalls.spliced <= recalls.looked_up - recalls.unfit


def test_a_conversation_finds_the_pages_of_its_answers(tiny_family: Path) -> None:
    llm = LLM(tiny_family, members=["solo"], dtype="float32")
    turns: list[dict[str, str]] = []
    written = 0
    letters = {"type": "string", "pattern": "^[a-z ]{24}$"}
    for number in range(3):
        turns.append({"role": "user", "content": f"add {number} and 2"})
        (answer,) = llm.generate([turns], member="solo", schema=letters, temperature=1.5, seed=number)
        known = answer.prompt_tokens + len(answer.ids) - (answer.finish_reason == "stop")
        assert answer.cached_tokens >= written // 16 * 16, "prompt and answer of the turn before"
        written = known - 1
        turns.append({"role": "assistant", "content": answer.text})
    assert llm.remembered.recalls.spliced == 3 and llm.remembered.recalls.differing > 0
