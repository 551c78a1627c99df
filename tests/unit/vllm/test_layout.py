"""What vLLM loads of a family: whole checkpoints with a tokenizer, plain LoRAs of the same function; what it cannot."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from heliostat.build import module_folder, read_family
from heliostat.errors import Refused
from heliostat.family import Row
from heliostat.linear.adapter import read_adapter
from heliostat.model.tokenizer import Tokenizer
from heliostat.vllm import layout


def test_a_checkpoint_is_whole_and_is_written_once(tiny_family: Path) -> None:
    family = read_family(tiny_family)
    found = layout.prepared(tiny_family, family, ["base", "base"])["base"]
    folder = Path(found.folder)
    assert folder.parent == tiny_family / layout.EXPORTS and found.rank == 0
    assert Tokenizer.load(folder).digest == family.tokenizer
    ours = load_file(next((tiny_family / "base").glob("*.safetensors")))
    theirs = load_file(next(folder.glob("*.safetensors")))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours) and ours.keys() == theirs.keys()
    marked = folder / "mark"
    marked.touch()
    layout.prepared(tiny_family, family, ["base"])
    assert marked.exists()


def test_a_full_module_brings_the_family_s_tokenizer(tiny_family: Path) -> None:
    family = read_family(tiny_family)
    full = [name for name, module in family.modules.items() if module.base is None and name != "base"]
    for found in layout.prepared(tiny_family, family, full, tiny_family / "elsewhere").values():
        assert Tokenizer.load(Path(found.folder)).digest == family.tokenizer
        assert Path(found.folder).parent == tiny_family / "elsewhere"


def test_an_adapter_is_a_lora_of_one_rank_and_the_same_function(tiny_family: Path) -> None:
    family = read_family(tiny_family)
    adapters = [name for name, module in family.modules.items() if module.base is not None]
    assert adapters
    for name, found in layout.prepared(tiny_family, family, adapters).items():
        config = json.loads((Path(found.folder) / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA" and config["r"] == config["lora_alpha"] == found.rank
        assert not config.get("rank_pattern") and not config.get("alpha_pattern")
        ours = read_adapter(module_folder(tiny_family, family.module(name)))
        theirs = read_adapter(Path(found.folder))
        assert ours.keys() == theirs.keys()
        for path, part in ours.items():
            assert theirs[path].b.shape[1] == found.rank and theirs[path].scale == 1
            width = theirs[path].a
            assert width is not None
            a = part.a
            if a is None:
                assert part.columns is not None
                a = torch.zeros(len(part.columns), width.shape[1]).scatter_(1, part.columns[:, None], 1)
            torch.testing.assert_close(theirs[path].b @ width, part.scale * part.b.float() @ a.float())


def test_different_ranks_and_scales_become_one() -> None:
    from heliostat.linear.adapter import Saved

    saved = {
        "model.layers.0.self_attn.q_proj": Saved(torch.randn(6, 2), 0.5, torch.randn(2, 4)),
        "model.layers.0.mlp.up_proj": Saved(torch.randn(5, 3), 2.0, torch.randn(3, 4)),
        "model.layers.1.mlp.up_proj": Saved(torch.randn(5, 2), 3.0, columns=torch.tensor([3, 1])),
    }
    found = layout._uniform(saved, {"up_proj": (4, 5), "q_proj": (4, 6)})
    for path, (a, b) in found.items():
        part = saved[path]
        assert a.shape[0] == b.shape[1] == 3
        if part.a is not None:
            torch.testing.assert_close(b @ a, part.scale * part.b @ part.a)
        else:
            wanted = torch.zeros(5, 4)
            wanted[:, [3, 1]] = part.scale * part.b
            torch.testing.assert_close(b @ a, wanted)


def test_an_adapter_that_changes_nothing(tiny_family: Path) -> None:
    family = read_family(tiny_family)
    folder = layout.zero_adapter(tiny_family, family, "base")
    assert folder == layout.zero_adapter(tiny_family, family, "base")
    assert all(not part.b.any() for part in read_adapter(Path(folder)).values())


def test_changed_files_are_refused(tiny_family: Path) -> None:
    family = read_family(tiny_family)
    name = next(name for name, module in family.modules.items() if module.base is not None)
    shutil.copy2(
        module_folder(tiny_family, family.module(name)) / "adapter_model.safetensors", tiny_family / "kept"
    )
    file = module_folder(tiny_family, family.module(name)) / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(Refused, match="changed"):
        layout.prepared(tiny_family, family, [name])


def test_what_must_fit_changes_the_fit(tiny_family: Path) -> None:
    family = read_family(tiny_family)
    one = layout.fit(tiny_family, family, dtype="float32", page_size=32)
    assert one == layout.fit(tiny_family, family, dtype="float32", page_size=32)
    others = [
        layout.fit(tiny_family, family, dtype="bfloat16", page_size=32),
        layout.fit(tiny_family, family, dtype="float32", page_size=16),
        layout.fit(tiny_family, family, dtype="float32", page_size=32, tensor_parallel=2),
    ]
    assert len({one, *others}) == 4


def test_every_sharing_of_a_plain_family_fits(tiny_family: Path) -> None:
    family = read_family(tiny_family)
    layout.refuse_unfit(tiny_family, family, {name: member.row for name, member in family.members.items()})


def test_what_vllm_cannot_play_is_refused_with_the_engine_that_can(tiny_family: Path) -> None:
    family = read_family(tiny_family)
    full = next(name for name, m in family.modules.items() if m.base is None and name != "base")
    adapter = next(name for name, m in family.modules.items() if m.base is not None)
    for row in (
        Row("base", "base", full, full),  # who speaks has weights of its own
        Row(full, "base", adapter, adapter),  # another wrote the prompt
        Row("base", "base", adapter, "base"),  # another speaks first
    ):
        with pytest.raises(Refused, match="embedded engine"):
            layout.refuse_unfit(tiny_family, family, {"m": row})


def test_codebooks_and_other_attention_are_refused(tiny_family: Path) -> None:
    family = read_family(tiny_family)
    coded = replace(
        family, modules={**family.modules, "base": replace(family.module("base"), quantization="m1v4g128")}
    )
    with pytest.raises(Refused, match="codebooks.*embedded engine"):
        layout.prepared(tiny_family, coded, ["base"])
    config = json.loads((tiny_family / "base" / "config.json").read_text())
    config |= {
        "model_type": f"heliostat_{config['model_type']}",
        "attention": {"kind": "affine", "n": "visible", "alpha": "learned"},
    }
    (tiny_family / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refused, match="'affine'.*embedded engine"):
        layout.refuse_unknown(tiny_family, family, "base")
