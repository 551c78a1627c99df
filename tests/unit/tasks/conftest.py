"""The tokenizer of the embedded base, built once for these tests."""

import pytest
from tokenizers import Tokenizer

from heliostat.tasks.tokenizer import train


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train()
