"""Weights from disk and back: what is missing, foreign or damaged is named; digests change when meaning does."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from heliostat.errors import Refused
from heliostat.model import weights
from heliostat.model.config import read_config
from heliostat.model.weights import (
    checkpoint_facts,
    digest_folder,
    digest_tensors,
    load_transformer,
    read_tensors,
    save_checkpoint,
    state_of,
    weight_files,
)


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Path:
    """A checkpoint of the test's own."""
    return Path(shutil.copytree(tiny_base, tmp_path / "hf"))


def load(folder: Path) -> dict[str, Tensor]:
    return state_of(load_transformer(folder, read_config(folder), dtype=torch.float32))


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def digest(folder: Path, *, fresh: bool = False) -> str:
    return digest_folder(folder, weight_files(folder), checkpoint_facts(folder), fresh=fresh)


def test_shards_are_one_checkpoint(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    whole, before = load(folder), digest(folder)
    save_checkpoint(tmp_path / "parts", whole, config_of(folder))
    assert len(weight_files(tmp_path / "parts")) > 2
    parts = load(tmp_path / "parts")
    assert parts.keys() == whole.keys() and all(torch.equal(parts[n], whole[n]) for n in whole)
    assert digest(tmp_path / "parts") == before  # the same tensors, however they are cut
    index = json.loads((tmp_path / "parts" / weights.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in whole.values())
    weight_files(tmp_path / "parts")[1].unlink()
    with pytest.raises(Refused, match=r"not there: model-00002-of-"):
        load(tmp_path / "parts")


@pytest.mark.parametrize("named", ["../other/model.safetensors", "/tmp/x.safetensors", 7, ["x"], ""])
def test_an_index_names_files_beside_it(folder: Path, named: object) -> None:
    (folder / weights.INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": named}}))
    with pytest.raises(Refused, match=r"is damaged: .* is no name of a file beside it"):
        weight_files(folder)


def test_a_damaged_file_is_named(folder: Path) -> None:
    path = folder / weights.SINGLE
    data = path.read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"\xff" * 100, data[:4], data + b"more"):
        path.write_bytes(damaged)
        with pytest.raises(Refused, match=r"model\.safetensors is damaged"):
            load(folder)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "weights.ckpt", "x.pkl"]
)
def test_a_pickle_is_refused_by_name_and_never_opened(name: str, folder: Path) -> None:
    (folder / weights.SINGLE).unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/opened'\ntR.")
    with pytest.raises(Refused, match=rf"{name} is a pickle"):
        load(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / weights.SINGLE).unlink()
    with pytest.raises(Refused, match=r"no model\.safetensors"):
        load(folder)


def test_missing_foreign_and_misshapen_tensors_are_named(folder: Path) -> None:
    path, state = folder / weights.SINGLE, load_file(folder / weights.SINGLE)
    less = {n: t for n, t in state.items() if n != "model.layers.1.mlp.up_proj.weight"}
    save_file(less, path)
    with pytest.raises(Refused, match=r"lacks 1 tensors.*model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder)
    save_file(state | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, path)
    with pytest.raises(Refused, match=r"'model\.layers\.0\.self_attn\.q_proj\.bias'"):
        load(folder)
    save_file(state | {"model.norm.weight": torch.zeros(31)}, path)
    with pytest.raises(Refused, match=r"model\.norm\.weight is \(31,\)"):
        load(folder)


def test_what_old_checkpoints_carry_along_is_passed_over(folder: Path) -> None:
    path, state = folder / weights.SINGLE, load_file(folder / weights.SINGLE)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    tied = {"lm_head.weight": state["model.embed_tokens.weight"].clone()}
    save_file(state | old | tied, path)
    assert load(folder).keys() == state.keys()


def test_a_loaded_model_is_frozen_and_in_the_asked_format(folder: Path) -> None:
    model = load_transformer(folder, read_config(folder), dtype=torch.bfloat16)
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.frequencies.dtype is torch.float32
    assert not any(p.is_meta for p in (*model.parameters(), *model.buffers()))


def test_a_digest_changes_with_every_fact_and_with_nothing_else() -> None:
    state = {"b": torch.arange(4.0), "a": torch.zeros(2, 3)}
    first = digest_tensors(state.items(), {"x": 1, "y": 2})
    assert digest_tensors(reversed(state.items()), {"y": 2, "x": 1}) == first
    assert len(first) == 64 and int(first, 16)
    others = [
        digest_tensors(state.items(), {"x": 1, "y": 3}),
        digest_tensors((state | {"a": torch.zeros(3, 2)}).items(), {"x": 1, "y": 2}),
        digest_tensors((state | {"a": torch.zeros(2, 3, dtype=torch.int32)}).items(), {"x": 1, "y": 2}),
        digest_tensors((state | {"a": -torch.zeros(2, 3)}).items(), {"x": 1, "y": 2}),  # -0.0: other bytes
        digest_tensors([("c", state["b"]), ("a", state["a"])], {"x": 1, "y": 2}),
        digest_tensors([("a", state["a"])], {"x": 1, "y": 2}),
    ]
    assert len({first, *others}) == 7
    assert digest_tensors([("a", torch.tensor(1.0)), ("e", torch.empty(0))], {})  # scalars and empty ones too


def test_the_digest_of_a_checkpoint_follows_what_changes_its_answers(folder: Path) -> None:
    before, config = digest(folder), config_of(folder)
    spelled = config | {"transformers_version": "0", "torch_dtype": "float32", "use_cache": False}
    (folder / "config.json").write_text(json.dumps(spelled))
    assert digest(folder) == before
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert digest(folder) != before


def test_a_remembered_digest_is_believed_only_while_the_files_stand(folder: Path) -> None:
    before = digest(folder)
    state = load_file(folder / weights.SINGLE)
    state["model.norm.weight"] *= 2
    save_file(state, folder / weights.SINGLE)
    assert digest(folder) != before
    times = (folder / weights.SINGLE).stat()
    state["model.norm.weight"] /= 2
    save_file(state, folder / weights.SINGLE)
    os.utime(folder / weights.SINGLE, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert digest(folder) != before  # size and time are as they were: the note is believed
    assert digest(folder, fresh=True) == before  # and `check` reads the bytes


@pytest.mark.parametrize(
    "note", ["", "{", "[]", '{"digest": 1}', "\xff\xfe", '{"files": null, "facts": null}']
)
def test_a_damaged_note_is_no_note(note: str, folder: Path) -> None:
    before = digest(folder)
    (folder / weights.DIGEST).write_bytes(note.encode("latin-1"))
    assert digest(folder) == before


def test_a_folder_that_cannot_be_written_has_a_digest_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, text: str) -> None:
        raise Refused(f"{path}: Read-only file system")

    monkeypatch.setattr(weights, "atomic_write_text", refuse)
    assert len(digest(folder)) == 64


def test_the_own_state_is_without_adapters_and_wrappers(folder: Path) -> None:
    from heliostat.linear.lora import add_adapter

    model = load_transformer(folder, read_config(folder), dtype=torch.float32)
    before = state_of(model)
    add_adapter(model, "x", r=2, alpha=4, targets=["q_proj", "down_proj"])
    after = state_of(model)
    assert after.keys() == before.keys() == {n for n, _ in read_tensors(weight_files(folder))}
    assert all(torch.equal(after[n], before[n]) for n in before)
