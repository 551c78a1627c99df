"""What people get wrong, and what can go wrong under them: one clear message each, and nothing is lost."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from heliostat.build import read_family
from tests.unit.cli.conftest import Heliostat

QUICK = ["--max-steps", 2, "--max-length", 128]
GOOD = {"prompt": "add 1 and 2", "completion": "3"}


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes data: objects become lines, texts are lines as they stand."""

    def write(*lines: Any) -> Path:
        path = tmp_path / "data.jsonl"
        path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
        return path

    return write


def changed(folder: Path, **facts: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


def flip(path: Path) -> None:
    """Another last byte: the file stays well-formed, a weight changes."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 0xFF
    path.write_bytes(bytes(content))


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Checkpoints.


def refused_init(heliostat: Heliostat, base: Path) -> str:
    family = base.parent / "fam"
    stderr = heliostat("init", family, "--base", base, status=2).stderr
    assert not (family / "family.json").exists() and not (family / "base").exists()
    return stderr


def test_missing_safetensors(heliostat: Heliostat, base: Path) -> None:
    (base / "model.safetensors").unlink()
    assert f"{base} has no model.safetensors" in refused_init(heliostat, base)


def test_damaged_safetensors(heliostat: Heliostat, base: Path) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path} is damaged or not safetensors" in refused_init(heliostat, base)


def test_a_pickle(heliostat: Heliostat, base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    stderr = refused_init(heliostat, base)
    assert f"{base / 'pytorch_model.bin'} is a pickle" in stderr and "safetensors" in stderr


def test_an_unknown_rope_type(heliostat: Heliostat, base: Path) -> None:
    changed(base, rope_parameters={"rope_type": "lama3", "rope_theta": 1e4})
    assert "no rope type 'lama3' (did you mean 'llama3'?)" in refused_init(heliostat, base)


def test_an_unknown_architecture_and_a_folder_that_is_none(heliostat: Heliostat, base: Path) -> None:
    changed(base, model_type="lama")
    assert "(did you mean 'llama'?)" in refused_init(heliostat, base)
    assert "gone is no folder" in refused_init(heliostat, base.parent / "gone")


def test_a_base_that_changed_after_a_member_was_tuned(heliostat: Heliostat, tiny_family: Path) -> None:
    remembered = read_family(tiny_family).module("base").digest[:12]
    flip(tiny_family / "base" / "model.safetensors")
    before = everything_in(tiny_family / "modules")
    stderr = heliostat("generate", tiny_family, "--member", "math", "--prompt", "a", status=2).stderr
    assert f"family.json has digest {remembered}, its files have " in stderr
    assert "code, math, plan" in stderr and "heliostat init" in stderr
    assert everything_in(tiny_family / "modules") == before


def test_a_damaged_module_spares_the_members_that_do_not_use_it(
    heliostat: Heliostat, tiny_family: Path
) -> None:
    path = tiny_family / "modules" / "math.own" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    words = ["generate", tiny_family, "--prompt", "a", "--max-tokens", 2]
    assert f"{path} is damaged" in heliostat(*words, "--member", "math", status=2).stderr
    heliostat(*words, "--member", "code")


# Names and words.


def test_a_member_name_used_twice(heliostat: Heliostat, tiny_family: Path, tiny_data: Path) -> None:
    before = everything_in(tiny_family)
    words = ["--member", "math", "--sharing", "sun", "--data", tiny_data, *QUICK]
    stderr = heliostat("train", tiny_family, *words, status=2).stderr
    assert "already a member 'math'" in stderr and "heliostat member rm" in stderr
    other = ["--member", "math", "--from", tiny_family / "modules" / "math.own"]
    assert "already a member 'math'" in heliostat("import", tiny_family, *other, status=2).stderr
    assert "already a member" in heliostat("member", "rename", tiny_family, "code", "math", status=2).stderr
    assert everything_in(tiny_family) == before | {
        "family.json.lock": (tiny_family / "family.json.lock").read_bytes()
    }


def test_a_misspelled_sharing(heliostat: Heliostat, bare_family: Path, tiny_data: Path) -> None:
    words = ["train", bare_family, "--member", "m", "--data", tiny_data]
    assert (
        "no sharing 'prefilshare' (did you mean 'prefillshare'?)"
        in heliostat(*words, "--sharing", "prefilshare", status=2).stderr
    )
    missing = heliostat(*words, status=2).stderr
    assert "sharing is missing; choose" in missing and "several agents read one long context" in missing


def test_folders_and_files_that_are_not_there(
    heliostat: Heliostat, bare_family: Path, tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    for command in ("inspect", "check", "chat"):
        assert f"heliostat init {gone} --base" in heliostat(command, gone, status=2).stderr
    words = ["--member", "m", "--sharing", "sun", "--data", gone]
    assert f"{gone} cannot be read: No such file" in heliostat("train", bare_family, *words, status=2).stderr


# Data.


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "empty line"),
        ('{"prompt": "a", "completion": ', "malformed JSON"),
        ({"prompt": "a", "completion": " "}, "empty completion"),
        ({"prompt": "a"}, "missing key 'completion'"),
        ({"prompt": "a", "completion": "one " * 200}, "more than max_length 128"),
        (
            {"prompt": [{"role": "assistant", "content": "a"}], "completion": "b"},
            "wrong role order: message 1",
        ),
    ],
)
def test_a_bad_line_is_named_with_its_number_and_reason(
    heliostat: Heliostat, bare_family: Path, jsonl: Callable[..., Path], line: Any, reason: str
) -> None:
    path = jsonl(GOOD, GOOD, line, GOOD)
    words = ["train", bare_family, "--member", "m", "--sharing", "sun", "--data", path, *QUICK]
    stderr = heliostat(*words, status=2).stderr
    assert f"{path}:3: " in stderr and reason in stderr
    assert read_family(bare_family).members == {}
    heliostat(*words, "--skip-bad", "--dry-run")


def test_turns_in_the_wrong_order(
    heliostat: Heliostat, bare_family: Path, jsonl: Callable[..., Path]
) -> None:
    turns = [{"role": role, "content": "a"} for role in ("user", "user", "assistant")]
    path = jsonl({"messages": turns})
    words = ["--member", "m", "--sharing", "sun", "--data", path, *QUICK]
    stderr = heliostat("train", bare_family, *words, status=2).stderr
    assert f"{path}:1: wrong role order: message 2 is 'user', not 'assistant'" in stderr


def test_a_file_without_lines(heliostat: Heliostat, bare_family: Path, jsonl: Callable[..., Path]) -> None:
    words = ["--member", "m", "--sharing", "sun", "--data", jsonl(), *QUICK]
    assert (
        "is empty; it should hold one JSON object a line"
        in heliostat("train", bare_family, *words, status=2).stderr
    )


# Tokenizers.


def test_importing_a_model_with_another_tokenizer(
    heliostat: Heliostat, bare_family: Path, base: Path
) -> None:
    template = base / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|end|>", ""))
    before = everything_in(bare_family)
    stderr = heliostat("import", bare_family, "--member", "old", "--from", base, status=2).stderr
    assert f"{base} has another tokenizer than the family" in stderr
    assert everything_in(bare_family) == before


def test_a_family_whose_tokenizer_changed(heliostat: Heliostat, tiny_family: Path) -> None:
    template = tiny_family / "base" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|end|>", ""))
    stderr = heliostat("generate", tiny_family, "--member", "math", "--prompt", "a", status=2).stderr
    assert "tokenizer" in stderr and "changed" in stderr and "put the original files back" in stderr


# The machine.


@pytest.mark.parametrize("full_from", [1, 3])
def test_a_disk_that_is_full_while_saving(
    heliostat: Heliostat, bare_family: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch, full_from: int
) -> None:
    """Full at the first file of the checkpoint, or once the checkpoint is there and the module is written."""
    from safetensors.torch import save_file

    saved: list[str] = []

    def save(tensors: Any, path: str, **options: Any) -> None:
        saved.append(path)
        if len(saved) >= full_from:
            raise OSError(errno.ENOSPC, "No space left on device", path)
        save_file(tensors, path, **options)

    words = ["train", bare_family, "--member", "m", "--sharing", "sun", "--data", tiny_data, *QUICK]
    with monkeypatch.context() as patch:
        patch.setattr("heliostat.model.weights.save_file", save)
        stderr = heliostat(*words, status=2).stderr
    assert "disk full while writing" in stderr and "run the same command again" in stderr
    assert read_family(bare_family).members == {}
    assert [p for p in bare_family.rglob("*") if ".partial-" in p.name] == []
    facts = json.loads(heliostat(*words, "--json").stdout)
    assert facts["steps"] == 2 and "m" in read_family(bare_family).members
