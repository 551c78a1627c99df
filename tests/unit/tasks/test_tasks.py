"""The embedded tasks: the same everywhere, train and test never meet, every completion suits its metric."""

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys

import pytest

from heliostat.errors import Refused
from heliostat.tasks import TASKS, Item, Task, final_answer, grade
from heliostat.tasks.tools import TOOLS

EACH = pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
SEEDS = (0, 1, 2)


@EACH
def test_the_same_seed_gives_the_same_items_and_another_seed_others(task: Task) -> None:
    assert task.train(0, 50) == task.train(0, 50)
    assert task.train(0, 50) != task.train(1, 50)
    assert task.test(0, 50) == task.test(0, 100)[:50]


def test_another_process_with_another_hash_seed_gives_the_same_items() -> None:
    program = (
        "from heliostat.tasks import TASKS; print([(t.train(3, 40), t.test(3, 40)) for t in TASKS.values()])"
    )
    run = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hashing, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            check=True,
        ).stdout
        for hashing in ("1", "2")
    ]
    here = str([(t.train(3, 40), t.test(3, 40)) for t in TASKS.values()])
    assert run[0] == run[1] == f"{here}\n".encode()


@EACH
def test_no_prompt_and_no_fact_is_in_both_train_and_test(task: Task) -> None:
    train = {item["prompt"]: item["completion"] for seed in SEEDS for item in task.train(seed, 3000)}
    test = {item["prompt"]: item["completion"] for seed in SEEDS for item in task.test(seed, 1000)}
    assert len(test) > 1000
    assert not train.keys() & test.keys()
    if task.name != "edit":  # there the fact is the text, and two texts can be edited into the same one
        assert not set(train.values()) & set(test.values())


def test_no_text_to_edit_is_in_both_train_and_test() -> None:
    def texts(items: list[dict[str, str]]) -> set[str]:
        quoted = (re.match(r'in "(.*)" ', item["prompt"]) for item in items)
        return {
            q[1] if q else item["prompt"].rpartition(": ")[2] for q, item in zip(quoted, items, strict=True)
        }

    assert not texts(TASKS["edit"].train(0, 5000)) & texts(TASKS["edit"].test(0, 2000))


@EACH
def test_prompts_are_unique_and_every_completion_grades_as_right(task: Task) -> None:
    items = task.train(5, 2000)
    assert len({item["prompt"] for item in items}) == 2000
    assert all(grade(task.metric, item["completion"], item["completion"]) for item in items)
    # A neighbour's answer is nearly always wrong: the metric tells answers apart.
    right = sum(grade(task.metric, a["completion"], b["completion"]) for a, b in itertools.pairwise(items))
    assert right < 60


def test_every_tool_call_has_its_tools_arguments_in_order() -> None:
    seen = set()
    for item in TASKS["tools"].test(0, 1000):
        call = json.loads(item["completion"])
        seen.add(call["tool"])
        assert list(call) == ["tool", *TOOLS[call["tool"]].arguments]
    assert seen == set(TOOLS)


def test_every_worked_answer_is_true_step_by_step() -> None:
    operators = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
    for item in TASKS["math"].train(0, 2000):
        worked, _, answer = item["completion"].partition(". answer: ")
        value = None
        for step in worked.split(", "):
            before, sign, operand, equals, after = step.split(" ")
            assert value is None or value == int(before)
            value = operators[sign](int(before), int(operand))
            assert (equals, value) == ("=", int(after))
            assert 1 <= value <= 99
            assert sign != "/" or int(before) % int(operand) == 0
        assert answer == str(value) == final_answer(item["completion"])


def test_known_edits() -> None:
    known: dict[str, tuple[list[str], list[str]]] = {}
    for item in TASKS["edit"].train(0, 3000):
        asked, _, sentence = item["prompt"].rpartition(": ")
        if " and then " not in asked:
            known.setdefault(asked, (sentence.split(), item["completion"].split()))
    text, edited = known["put the words in reverse order"]
    assert edited == text[::-1]
    text, edited = known["move the first word to the end"]
    assert edited == [*text[1:], text[0]]
    text, edited = known["swap the first and the last word"]
    assert edited == [text[-1], *text[1:-1], text[0]]
    text, edited = known["shout the second word"]
    assert edited == [text[0], text[1].upper(), *text[2:]]


def test_asking_for_more_items_than_there_are_is_refused() -> None:
    poor = Task("poor", "exact", "ten items", lambda rng: Item(p := str(rng.randrange(10)), p, p))
    with pytest.raises(Refused, match="fewer than 11 different items"):
        poor.train(0, 11)


def test_the_items_are_these_forever() -> None:
    """Published results hang on the items: whoever changes a generator changes this digest, knowingly."""
    items = [(task.name, task.train(0, 200), task.test(0, 200)) for task in TASKS.values()]
    digest = hashlib.sha256(json.dumps(items, sort_keys=True).encode()).hexdigest()
    assert digest[:16] == "c6ce4778605facf9"
