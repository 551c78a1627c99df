"""What a task is: a seeded generator of prompts and completions whose train and test items can never meet."""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

from heliostat.errors import Refused

# One fact in eight is for testing only. The side hangs on the fact, never on the seed, so that any train set
# is disjoint from any test set.
_TEST_SHARE = 8
_PATIENCE = 1000


@dataclass(frozen=True, slots=True)
class Item:
    """One exercise. Two items of one prompt must have the same facts: it is the facts that are split."""

    prompt: str
    completion: str
    facts: str


def is_test(task: str, facts: str) -> bool:
    """Whether these facts belong to the test side; the same in every process, on every machine."""
    return hashlib.sha256(f"{task}\n{facts}".encode()).digest()[0] % _TEST_SHARE == 0


@dataclass(frozen=True, slots=True)
class Task:
    name: str
    metric: str
    """How an answer is judged: see heliostat.tasks.grade."""
    what: str
    """One line for people."""
    generate: Callable[[random.Random], Item]

    def train(self, seed: int, n: int) -> list[dict[str, str]]:
        """n different items {"prompt", "completion"} of the training side."""
        return self._draw(seed, n, test=False)

    def test(self, seed: int, n: int) -> list[dict[str, str]]:
        """n different items {"prompt", "completion"} of the test side: no train set has their facts."""
        return self._draw(seed, n, test=True)

    def _draw(self, seed: int, n: int, *, test: bool) -> list[dict[str, str]]:
        rng = random.Random(f"{self.name}/{'test' if test else 'train'}/{seed}")  # a str seeds by SHA-512
        items: dict[str, str] = {}
        for _ in range(_PATIENCE * max(n, 1)):
            if len(items) >= n:
                return [{"prompt": prompt, "completion": completion} for prompt, completion in items.items()]
            item = self.generate(rng)
            if is_test(self.name, item.facts) == test:
                items.setdefault(item.prompt, item.completion)
        raise Refused(f"task {self.name!r} has fewer than {n} different items: ask for at most {len(items)}")
