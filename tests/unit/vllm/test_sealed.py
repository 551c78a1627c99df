"""Files of an export are what was sealed, all of them and no others; else it is said which."""

from collections.abc import Callable
from pathlib import Path

import pytest

from heliostat.errors import Refused
from heliostat.vllm.sealed import SEAL, refuse_other, seal

MODULE = "a" * 64


def export(folder: Path) -> Path:
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    seal(folder, MODULE)
    return folder


def test_what_was_sealed_is_let_pass(tmp_path: Path) -> None:
    refuse_other(export(tmp_path), MODULE)
    (tmp_path / ".nfs000").touch()  # nobody loads it
    refuse_other(tmp_path, MODULE)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"weighty"),
            "model.safetensors is not what",
        ),
        (lambda folder: (folder / "config.json").unlink(), "missing.*config.json"),
        (lambda folder: (folder / "more.safetensors").touch(), "not exported.*more.safetensors"),
        (lambda folder: (folder / SEAL).unlink(), f"{SEAL} is not there"),
        (lambda folder: (folder / SEAL).write_text("{}"), "not aaaaaaaaaaaa"),
        (lambda folder: seal(folder, "b" * 64), "digest bbbbbbbbbbbb, not aaaaaaaaaaaa"),
        (lambda folder: (folder / SEAL).write_text(f'{{"module": "{MODULE}", "files": 3}}'), "not exported"),
    ],
)
def test_anything_else_is_refused_by_name(
    tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    damage(export(tmp_path))
    with pytest.raises(Refused, match=words):
        refuse_other(tmp_path, MODULE)
