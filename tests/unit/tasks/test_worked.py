"""Worked answers: sums are right, the number at the end is theirs, wording is free, and what is held out stays so."""

import random
import re

import pytest

from heliostat.tasks.grade import final_answer, grade
from heliostat.tasks.task import Task, is_test
from heliostat.tasks.words import NAMES, number_words
from heliostat.tasks.worked import HELD_OUT, WORKED, generate

SUM = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


@pytest.mark.parametrize("task", [WORKED, HELD_OUT])
def test_what_is_worked_out_is_true(task: Task) -> None:
    rng = random.Random(5)
    for _ in range(300):
        item = generate(rng, held_out=task is HELD_OUT)
        number = int(item.facts.split()[0])
        for before, operator, operand, after in SUM.findall(item.facts):
            assert number == int(before)
            number = int(summed(int(before), operator, int(operand)))
            assert number == int(after) and 1 <= number <= 30
        assert final_answer(item.completion) == str(number)
        for before, operator, operand, after in SUM.findall(item.completion):
            assert f"{before} {operator} {operand} = {after}" in item.facts


def summed(a: int, operator: str, b: int) -> float:
    return {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[operator]


def test_one_story_has_many_right_answers() -> None:
    items = [generate(random.Random(seed)) for seed in range(4000)]
    by_facts: dict[str, set[str]] = {}
    for item in items:
        by_facts.setdefault(item.facts, set()).add(item.completion)
    several = [answers for answers in by_facts.values() if len(answers) > 1]
    assert len(several) > 50
    for answers in several:
        one, *others = sorted(answers)
        assert all(grade("contains", other, one) for other in others)


def test_held_out_tellings_are_never_learned_and_are_made_of_known_words() -> None:
    learned, held_out = WORKED.train(0, 3000), HELD_OUT.test(0, 500)
    phrases = {telling(s) for item in learned for s in item["prompt"].split(". ")[1:-1]}
    new = {telling(s) for item in held_out for s in item["prompt"].split(". ")[1:-1]}
    assert len(new) >= 10 and not new & phrases
    assert {w for phrase in new for w in phrase.split()} <= {w for phrase in phrases for w in phrase.split()}


def telling(sentence: str) -> str:
    """A sentence without its name and number."""
    numbers = {number_words(n) for n in range(31)}
    words = ["N" if w in numbers or w.isdigit() else "X" if w in NAMES else w for w in sentence.split()]
    return " ".join(words)


def test_no_facts_for_testing_are_learned_however_they_are_told() -> None:
    assert WORKED.name == HELD_OUT.name
    sums = {i["completion"]: i["prompt"] for i in WORKED.train(0, 500)}
    rng, found = random.Random(0), 0
    for _ in range(2000):
        item = generate(rng, held_out=True)
        if is_test(HELD_OUT.name, item.facts):
            found += 1
            assert item.completion not in sums
    assert found > 100
