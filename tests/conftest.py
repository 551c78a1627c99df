"""A toy base and a toy family of every sharing, so small that all takes milliseconds."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Before torch is loaded, here and in the processes that tests start: toys gain nothing from threads, and on a
# busy machine threads that wait for each other make them many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Ctrl-C is Ctrl-C for every test, whatever the shell or a test before has made of it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


TEXTS = ["add 2 and 3", "the answer is 5", "say hello to the world", "one two three four five six seven"]
SHAPE = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}
SHARED = {
    "solo": ("independent", "full"),
    "math": ("sun", "full"),
    "code": ("prefillshare", "full"),
    "plan": ("icarus", "lora"),
}
"""Members of ``tiny_family``: how each shares, and its tuner."""


def write_checkpoint(folder: Path, *, seed: int = 0, **shape: Any) -> Path:
    """A Hugging Face folder: 2 layers of random float32 weights, a byte-level tokenizer with a template."""
    import torch

    from heliostat.model.config import parse_config
    from heliostat.model.transformer import Transformer
    from heliostat.model.weights import save_checkpoint, state_of
    from heliostat.tasks import tokenizer as made

    trained = made.train(vocabulary=300, texts=TEXTS)
    facts = {**SHAPE, "vocab_size": trained.get_vocab_size(), **shape}
    torch.manual_seed(seed)
    model = Transformer(parse_config(facts))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    # As if trained, so that each part of attention can be seen.
    for name, tensor in model.state_dict().items():
        if name.endswith("sinks"):
            torch.nn.init.normal_(tensor)
        elif name.endswith("alpha_ma"):
            torch.nn.init.uniform_(tensor, 0.3, 0.9)
    save_checkpoint(folder, state_of(model), facts)
    made.save(trained, folder, max_length=facts["max_position_embeddings"])
    return folder


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes one more toy checkpoint: ``make_checkpoint(seed=1, num_hidden_layers=3)``."""
    return lambda **options: write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "hf", **options)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy checkpoint in Hugging Face's layout. Read only: copy it to change it."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 prompts with completions. Read only."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    items = [{"prompt": f"add {a} and {b}", "completion": str(a + b)} for a in range(4) for b in range(6)]
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def bare_family_made(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """The family that ``bare_family`` copies. Read only."""
    from heliostat.build import init_family

    folder = tmp_path_factory.mktemp("bare") / "fam"
    init_family(folder, tiny_base)
    return folder


@pytest.fixture(scope="session")
def tiny_family_made(
    tmp_path_factory: pytest.TempPathFactory, bare_family_made: Path, tiny_data: Path
) -> Path:
    """The family that ``tiny_family`` copies. Read only."""
    folder = tmp_path_factory.mktemp("tiny") / "fam"
    shutil.copytree(bare_family_made, folder)
    for member, (sharing, tuner) in SHARED.items():
        _tune(folder, member, sharing, tiny_data, tuner=tuner, max_steps=3)
    return folder


def _tune(folder: Path, member: str, sharing: str, data: Path, **options: Any) -> Any:
    from contextlib import nullcontext

    from heliostat.train.recipe import Recipe
    from heliostat.train.spellings import make_recipe
    from heliostat.train.tune import tune
    from heliostat.train.watch import Silent

    who = {"family": str(folder), "member": member, "sharing": sharing, "data": str(data)}
    recipe = make_recipe(Recipe, {**who, "learning_rate": 0.03, "max_length": 128, **options})
    return tune(recipe, watching=lambda job: nullcontext(Silent()))


@pytest.fixture
def bare_family(bare_family_made: Path, tmp_path: Path) -> Path:
    """A toy family without members, the test's own to change."""
    return Path(shutil.copytree(bare_family_made, tmp_path / "fam"))


@pytest.fixture
def tiny_family(tiny_family_made: Path, tmp_path: Path) -> Path:
    """A toy family with one member of every sharing (see SHARED), the test's own to change."""
    return Path(shutil.copytree(tiny_family_made, tmp_path / "fam"))


@pytest.fixture(scope="session")
def tune_member() -> Callable[..., Any]:
    """Tunes one more member, quietly: ``tune_member(folder, "m", "sun", data, max_steps=9)``; its Outcome."""
    return _tune
