"""What the promises share: toy modules, their tokenizer, and the count of ties that every run reports."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from heliostat.build import Loaded
from heliostat.model.config import read_config
from heliostat.model.tokenizer import Tokenizer
from heliostat.model.transformer import Transformer
from heliostat.model.weights import load_transformer
from tests.promises.crews import forget_memories
from tests.promises.toys import Exactness, toy_modules

_COUNT = Exactness()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order: toys are too small for more threads anyway."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_memory_left() -> Iterator[None]:
    """What workers keep their pages in goes with the test."""
    yield
    forget_memories()


@pytest.fixture
def exactness() -> Exactness:
    """Compares answers; its counts are printed when all tests have run."""
    return _COUNT


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tokens were held to a reference, and how many comparisons a tie ended."""
    if _COUNT.tokens:
        terminalreporter.write_line(f"token-exact: {_COUNT.tokens} tokens compared, {_COUNT.ties} ties")


@pytest.fixture(scope="session")
def tokenizer(tiny_base: Path) -> Tokenizer:
    """The toys' tokenizer."""
    return Tokenizer.load(tiny_base)


@pytest.fixture(scope="session")
def tiny_model(tiny_base: Path) -> Transformer:
    """The toy base's weights. Read only."""
    return load_transformer(tiny_base, read_config(tiny_base), dtype=torch.float32)


@pytest.fixture(scope="session")
def modules(tiny_model: Transformer) -> dict[str, Loaded]:
    """base, three full modules and two adapters. Read only."""
    return toy_modules(tiny_model)
