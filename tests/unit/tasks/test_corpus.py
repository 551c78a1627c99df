"""The pretraining corpus: seeded, varied, short enough, and free of what the tasks will ask."""

import itertools
import random
import re
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer

from heliostat.tasks import TASKS
from heliostat.tasks.corpus import MIXTURE, documents, rendered
from heliostat.tasks.lessons import Document
from heliostat.tasks.tools import TOOLS


def test_the_same_seed_gives_the_same_documents_and_a_longer_stream_only_adds() -> None:
    assert list(documents(0, 300)) == list(itertools.islice(documents(0, 1000), 300))
    assert list(documents(0, 50)) != list(documents(1, 50))


@pytest.mark.parametrize("lesson", MIXTURE, ids=lambda lesson: lesson.__name__)
def test_every_lesson_is_varied_and_well_formed(lesson: Callable[[random.Random], Document]) -> None:
    rng = random.Random(lesson.__name__)
    made = [lesson(rng) for _ in range(300)]
    assert len({rendered(document) for document in made}) > 150
    for document in made:
        if "messages" in document:
            roles = [m["role"] for m in document["messages"] if m["role"] != "system"]
            assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
            assert all(m["content"] for m in document["messages"])
        else:
            assert document["text"].strip()
        assert not re.search(r"<\|(?!user|assistant|system|end)", rendered(document))


def test_documents_fit_the_window(tokenizer: Tokenizer) -> None:
    lengths = [len(tokenizer.encode(rendered(document)).ids) for document in documents(2, 3000)]
    assert 60 < sum(lengths) / len(lengths) < 130
    assert sum(length > 256 for length in lengths) <= 3


def test_prompts_and_completions_of_the_tasks_are_short(tokenizer: Tokenizer) -> None:
    for task in TASKS.values():
        items = task.test(0, 500)
        prompts = sorted(len(tokenizer.encode(item["prompt"]).ids) for item in items)
        answers = [len(tokenizer.encode(item["completion"]).ids) for item in items]
        assert 15 < sum(prompts) / len(prompts) < 45
        assert prompts[int(0.95 * len(prompts))] <= 52
        assert prompts[-1] <= 80 and max(answers) <= 48


def test_the_corpus_gives_no_task_away() -> None:
    text = "\n".join(rendered(document) for document in documents(3, 5000))
    assert '"tool"' not in text
    assert "answer:" not in text
    prompts = {item["prompt"] for task in TASKS.values() for item in task.test(0, 1000)}
    contents = {m["content"] for d in documents(3, 5000) if "messages" in d for m in d["messages"]}
    assert not prompts & contents
    ways = {way for tool in TOOLS.values() for way in tool.ways}
    assert not any(way.split("{")[0].strip() in text for way in ways if len(way.split("{")[0]) > 14)
