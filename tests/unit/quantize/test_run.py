"""``quantize`` from wish to module: what it makes, what it refuses, how it goes on, and what members make of it."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from heliostat.build import (
    RUNS,
    init_family,
    load_modules,
    module_folder,
    read_family,
    verify_member,
    verify_module,
    write_family,
)
from heliostat.check import check_family
from heliostat.engine.ledger import weights_of
from heliostat.errors import Refused
from heliostat.export import export_member, import_member, remove_member
from heliostat.family import Family, Member, Row
from heliostat.files import locked
from heliostat.linear.codebook import coded_linears
from heliostat.llm import LLM
from heliostat.model.config import read_config
from heliostat.model.quantized import QUANTIZATION, read_quantization
from heliostat.model.weights import load_transformer, read_tensors, save_tensors, weight_files
from heliostat.ops import native
from heliostat.ops.codebook_product import ByRows
from heliostat.ops.native import coded as kernel
from heliostat.quantize import run
from heliostat.quantize.fit import Effort
from heliostat.quantize.run import QUANTIZING, Quantized, Wish, quantize, remove_module
from heliostat.survey import survey
from heliostat.train.recipe import Recipe
from heliostat.train.spellings import make_recipe
from heliostat.train.tune import tune
from heliostat.train.watch import Silent
from tests.conftest import write_checkpoint

QUICK: dict[str, Any] = {"tokens": 400, "tuning_steps": 2, "effort": Effort(rounds=1, beam=1, steps=4)}


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "texts.jsonl"
    texts = [f"add {a} and {b}, the answer is {a + b}" for a in range(6) for b in range(6)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def wish(bare_family: Path, calibration: Path) -> Callable[..., Wish]:
    def made(**other: Any) -> Wish:
        usual = {"family": str(bare_family), "name": "low", "format": "m1v4g32", "data": str(calibration)}
        return Wish(**{**usual, **QUICK, **other})

    return made


@pytest.fixture(scope="session")
def low_family_made(
    tmp_path_factory: pytest.TempPathFactory, bare_family_made: Path, calibration: Path
) -> Path:
    folder = Path(shutil.copytree(bare_family_made, tmp_path_factory.mktemp("low") / "fam"))
    quantize(Wish(family=str(folder), name="low", format="m1v4g32", data=str(calibration), **QUICK))
    return folder


@pytest.fixture(scope="session")
def tuned_family_made(
    tmp_path_factory: pytest.TempPathFactory,
    low_family_made: Path,
    tiny_data: Path,
    tune_member: Callable[..., Any],
) -> Path:
    folder = Path(shutil.copytree(low_family_made, tmp_path_factory.mktemp("tuned") / "fam"))
    tune_member(folder, "plain", "sun", tiny_data, max_steps=2)
    tune_member(folder, "mathq", "sun", tiny_data, speaker="low", max_steps=2)
    tune_member(folder, "codeq", "prefillshare", tiny_data, writer="low", max_steps=2)
    tune_member(folder, "planq", "icarus", tiny_data, writer="low", max_steps=2)
    return folder


@pytest.fixture
def tuned_family(tuned_family_made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tuned_family_made, tmp_path / "tuned"))


def test_a_module_is_made_and_known(low_family_made: Path) -> None:
    family = read_family(low_family_made)
    module = family.module("low")
    assert (module.base, module.quantization) == (None, "m1v4g32") and family.users("low") == ()
    folder = module_folder(low_family_made, module)
    quantization = read_quantization(folder)
    assert quantization is not None and len(quantization.linears) == 2 * 7
    assert len(quantization.report["errors"]) == 2 and quantization.source["module"] == "base"
    assert not (low_family_made / QUANTIZING / "low").exists()
    assert all(finding.ok for finding in check_family(low_family_made))
    model = load_modules(low_family_made, family, ["low"], dtype=torch.float32)["low"].model
    dense = load_transformer(folder, read_config(folder), dtype=torch.float32, dense=True)
    assert len(coded_linears(model)) == 14 and not coded_linears(dense)
    for path, linear in coded_linears(model).items():
        plain = dense.get_submodule(path).weight
        assert isinstance(plain, torch.Tensor) and torch.equal(linear.weight.float(), plain)
    base = load_modules(low_family_made, family, ["base"], dtype=torch.float32)["base"].model
    assert torch.equal(base.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_the_same_seed_makes_the_same_module_and_another_does_not(wish: Callable[..., Wish]) -> None:
    first, same, other = (quantize(wish(name=n, seed=s)) for n, s in (("a", 0), ("b", 0), ("c", 1)))
    assert first.module.digest == same.module.digest != other.module.digest
    assert isinstance(first, Quantized) and first.loss == same.loss
    assert 0 < first.errors[0]["tuned"] <= first.errors[0]["block"] < 1
    told = first.to_json()
    assert json.dumps(told) and told["perplexity"][1] > 1


def test_bytes_are_those_of_the_tensors(low_family_made: Path) -> None:
    family = read_family(low_family_made)
    model = load_modules(low_family_made, family, ["low"], dtype=torch.float32)["low"].model
    held = [*model.parameters(), *(b for part in coded_linears(model).values() for b in part.buffers())]
    size = sum(t.numel() * t.element_size() for t in {id(t): t for t in held}.values())
    line, copies = weights_of(low_family_made, family, ["low"], dtype=torch.float32).lines
    plain = sum(part.in_features * part.out_features for part in coded_linears(model).values())
    assert line == ("weights of low", size) and copies[1] == 4 * plain
    facts = {m.name: m for m in survey(low_family_made, family).modules}["low"]
    assert facts.bytes == size and facts.quantization == "m1v4g32" and "bits" in facts.kind
    assert facts.bits is not None and facts.bits > 2


@pytest.mark.skipif(not (native.built() and kernel.built()), reason="the compiled kernels do not run here")
@torch.inference_mode()
def test_copies_to_multiply_by_are_those_that_are_made(low_family_made: Path) -> None:
    family, dtype = read_family(low_family_made), torch.bfloat16
    model = load_modules(low_family_made, family, ["low"], dtype=dtype)["low"].model
    model.join()
    assert isinstance(model.at_once, ByRows)
    for rows in (1, 64):
        model.at_once.made_for(rows)
    kept = [part.product.bytes for part in coded_linears(model).values()]
    copies = weights_of(low_family_made, family, ["low"], dtype=dtype).lines[1]
    assert copies[1] == sum(own["packed"] + own["dense"] for own in kept)
    weights = [part.product.dense(dtype).untyped_storage() for part in coded_linears(model).values()]
    stored = {one.data_ptr(): one.nbytes() for one in weights}
    assert sum(stored.values()) == sum(own["dense"] for own in kept), "each is there once"


def test_what_cannot_be_is_refused_before_anything_is_computed(
    wish: Callable[..., Wish],
    bare_family: Path,
    tmp_path: Path,
    tiny_data: Path,
    tune_member: Callable[..., Any],
) -> None:
    def refused(message: str, **other: Any) -> None:
        with pytest.raises(Refused, match=message):
            quantize(wish(**other))

    refused("there is already a module 'base'", name="base")
    refused("no module name", name="../x")
    refused("no module 'bas' .did you mean 'base'", module="bas")
    refused("is no format", format="4bit")
    refused("q_proj has 32 inputs, which vectors of 3", format="m1v3g6")
    refused("groups of 128 do not divide; inputs here are 32, 64", format="m1v4g128")
    refused("cannot be read", data=str(tmp_path / "none.jsonl"))
    refused("tokens is 0", tokens=0)
    refused("is no family", family=str(tmp_path))
    tune_member(bare_family, "plan", "icarus", tiny_data, max_steps=1)
    refused("is an adapter on 'base'", module="plan.own")
    refused("is the name of a member", name="plan")
    assert not (bare_family / QUANTIZING).exists()
    quantize(wish())
    refused("there is already a module 'low'")
    refused("is quantized already", module="low", name="lower")
    with pytest.raises(Refused, match="'low' is the name of a module"):
        tune_member(bare_family, "low", "sun", tiny_data, max_steps=1)


def test_data_on_which_the_module_does_not_work_are_refused(
    wish: Callable[..., Wish], bare_family: Path
) -> None:
    base = bare_family / "base"
    (file,) = weight_files(base)
    tensors = dict(read_tensors([file]))
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e30
    tensors["model.layers.1.mlp.gate_proj.weight"] *= 1e30
    save_tensors(tensors, file)
    with pytest.raises(Refused, match="changed"):  # first of all, it is not the family's base any more
        quantize(wish())
    family = read_family(bare_family)
    from heliostat.build import describe_module

    write_family(
        bare_family,
        family.with_module(describe_module(bare_family, "base", "base", base=None, family=family)),
    )
    with pytest.raises(Refused, match="does not work"):
        quantize(wish())


class Killed(BaseException):
    """As if the process had died here."""


def test_killed_at_any_time_it_goes_on_and_comes_to_the_same(
    wish: Callable[..., Wish], bare_family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quantize(wish(name="whole"))
    real, made = run.quantize_block, list[str]()

    def dying(stream: Any, number: int, *args: Any, **options: Any) -> Any:
        if number == 1 and not made.count("died"):
            made.append("died")
            raise Killed
        made.append(str(number))
        return real(stream, number, *args, **options)

    monkeypatch.setattr(run, "quantize_block", dying)
    with pytest.raises(Killed):
        quantize(wish())
    with pytest.raises(Refused, match="begun with other format"):
        quantize(wish(format="m1v4grow"))
    assert "low" not in read_family(bare_family).modules
    found = quantize(wish())
    assert made == ["0", "died", "1"] and found.module.digest == whole.module.digest
    assert [error["tuned"] for error in found.errors] == [error["tuned"] for error in whole.errors]


def test_a_layer_that_was_damaged_meanwhile_is_made_again(
    wish: Callable[..., Wish], bare_family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, said = run._publish, list[str]()

    def dying(*args: Any) -> Any:
        raise Killed

    monkeypatch.setattr(run, "_publish", dying)
    with pytest.raises(Killed):
        quantize(wish())
    place = bare_family / QUANTIZING / "low"
    (place / "layer-00001" / "layer.safetensors").write_bytes(b"nothing")
    (place / "layer-00000.partial-999999999-1").mkdir()
    monkeypatch.setattr(run, "_publish", real)
    quantize(wish(), echo=said.append)
    assert any("is damaged and is made again" in line for line in said) and not place.exists()


def test_two_at_once_are_kept_apart(wish: Callable[..., Wish], bare_family: Path) -> None:
    place = bare_family / QUANTIZING / "low"
    place.mkdir(parents=True)
    with locked(place / "run.lock"), pytest.raises(Refused, match="held by another heliostat command"):
        quantize(wish())


def test_members_are_tuned_through_it_and_served_as_they_were_tuned(tuned_family: Path) -> None:
    family = read_family(tuned_family)
    assert family.row("mathq") == Row("mathq.own", "low", "low", "mathq.own")
    assert family.row("codeq") == Row("low", "codeq.own", "codeq.own", "codeq.own")
    assert family.row("planq") == Row("low", "low", "planq.own", "planq.own")
    assert family.module("planq.own").base == "low" and family.users("low") == ("mathq", "codeq", "planq")
    assert [finding.text for finding in check_family(tuned_family) if not finding.ok] == []
    llm = LLM(tuned_family, dtype="float32")
    prompts, names = ["add 1 and 2"] * 4, ["plain", "mathq", "codeq", "planq"]
    mixed = llm.generate(prompts, member=names, max_tokens=6)
    alone = [
        LLM(tuned_family, members=[n], dtype="float32").generate("add 1 and 2", member=n, max_tokens=6)[0]
        for n in names
    ]
    assert [answer.ids for answer in mixed] == [answer.ids for answer in alone]


def test_a_row_that_names_another_speaker_is_refused_with_what_mends_it(tuned_family: Path) -> None:
    family = read_family(tuned_family)
    plain = family.member("plain")
    row = Row(plain.row.prompt_writer, "low", "low", plain.row.first_speaker)
    write_family(tuned_family, family.with_member(Member("plain", row, plain.sharing, plain.digests)))
    command = f"heliostat train {tuned_family} --member NEW --sharing sun --data DATA --speaker low"
    with pytest.raises(Refused, match="tuned with base, and its row names low") as told:
        LLM(tuned_family, members=["plain"])
    assert command in str(told.value)
    (finding,) = [f for f in check_family(tuned_family) if not f.ok]
    assert finding.name == "member plain" and command in finding.text


def test_another_quantization_is_another_digest_and_changed_files_are_found(
    tuned_family: Path, tiny_data: Path, tune_member: Callable[..., Any]
) -> None:
    family = read_family(tuned_family)
    path = module_folder(tuned_family, family.module("low")) / QUANTIZATION
    told = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(told | {"report": {}}), encoding="utf-8")
    verify_module(tuned_family, family, "low")  # what is said about it changes nothing
    path.write_text(json.dumps(told | {"format": "m1v4grow"}), encoding="utf-8")
    with pytest.raises(Refused, match="module 'low' changed.*make another: heliostat quantize"):
        verify_module(tuned_family, family, "low")
    path.write_text(json.dumps(told | {"format_version": 2}), encoding="utf-8")
    with pytest.raises(Refused, match="format_version 2"):
        tune_member(tuned_family, "more", "sun", tiny_data, speaker="low", max_steps=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.0.mlp.up_proj.codes"), "lacks 1 tensors"),
        (
            lambda t: t.update(
                {"model.layers.0.mlp.up_proj.codes": torch.zeros(64, 7, 1, dtype=torch.uint8)}
            ),
            "codes is",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.codes": torch.zeros(64, 8, 1)}),
            "codes must be uint8",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(64, 32)}),
            "as configured has not",
        ),
    ],
)
def test_damaged_tensors_are_refused(
    low_family_made: Path, tmp_path: Path, change: Any, message: str
) -> None:
    folder = Path(shutil.copytree(low_family_made / "modules" / "low", tmp_path / "low"))
    (file,) = weight_files(folder)
    tensors = dict(read_tensors([file]))
    change(tensors)
    save_tensors(tensors, file)
    with pytest.raises(Refused, match=message):
        load_transformer(folder, read_config(folder), dtype=torch.float32)


def test_export_refuses_codebooks_or_writes_what_they_stand_for(tuned_family: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="say --dequantize"):
        export_member(tuned_family, "mathq", tmp_path / "out")
    out = export_member(tuned_family, "mathq", tmp_path / "out", dequantize=True)
    written = load_transformer(out / "base", read_config(out / "base"), dtype=torch.float32)
    low = module_folder(tuned_family, read_family(tuned_family).module("low"))
    dense = load_transformer(low, read_config(low), dtype=torch.float32, dense=True)
    for (name, ours), (_, theirs) in zip(written.named_parameters(), dense.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert "which is what a quantized module stands for" in (out / "README.md").read_text(encoding="utf-8")
    rides = export_member(tuned_family, "planq", tmp_path / "rides", dequantize=True)
    assert (rides / "adapter_config.json").is_file() and (rides / "base" / "config.json").is_file()
    export_member(tuned_family, "plain", tmp_path / "plain")
    assert not (tmp_path / "plain" / "base").exists()
    with pytest.raises(Refused, match="lies in codebooks"):
        import_member(tuned_family, "back", low)


def test_it_stays_when_its_members_go_and_goes_when_nobody_uses_it(tuned_family: Path) -> None:
    with pytest.raises(Refused, match="is used by mathq, codeq, planq"):
        remove_module(tuned_family, "low")
    with pytest.raises(Refused, match="not a quantized module"):
        remove_module(tuned_family, "plain.own")
    for member in ("mathq", "codeq", "planq"):
        assert remove_member(tuned_family, member) == [f"modules/{member}.own"]
    folder = module_folder(tuned_family, read_family(tuned_family).module("low"))
    remove_module(tuned_family, "low")
    assert "low" not in read_family(tuned_family).modules and not folder.exists()


def test_it_stays_while_a_run_tunes_through_it(low_family_made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(low_family_made, tmp_path / "fam"))
    begun = folder / RUNS / "mathq"
    begun.mkdir(parents=True)
    (begun / "recipe.yaml").write_text("speaker: low\n", encoding="utf-8")
    with pytest.raises(Refused, match=r"runs/mathq tunes through"):
        remove_module(folder, "low")
    (begun / "recipe.yaml").write_text("speaker: base\n", encoding="utf-8")
    remove_module(folder, "low")
    with pytest.raises(Refused, match="stands on"):
        remove_module(folder, "base")


def test_a_run_is_not_published_beside_another_module_than_it_was_tuned_with(
    low_family_made: Path, calibration: Path, tiny_data: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(low_family_made, tmp_path / "fam"))
    again: dict[str, Any] = {
        "family": str(folder),
        "name": "low",
        "format": "m2v8g32",
        "data": str(calibration),
        **QUICK,
    }

    def another(job: Any) -> Any:
        family = read_family(folder)
        shutil.rmtree(module_folder(folder, family.module("low")))
        write_family(folder, family.without_module("low"))
        quantize(Wish(**again))
        return nullcontext(Silent())

    who = {"family": str(folder), "member": "mathq", "sharing": "sun", "data": str(tiny_data)}
    recipe = make_recipe(Recipe, {**who, "speaker": "low", "max_steps": 1})
    with pytest.raises(Refused, match="module 'low' is no longer what this member was tuned with"):
        tune(recipe, watching=another)
    assert "mathq" not in read_family(folder).members


def test_a_base_with_numbers_for_each_head_is_quantized_without_them(
    tmp_path: Path, calibration: Path
) -> None:
    kind: dict[str, Any] = {"model_type": "heliostat_llama", "attention": {"kind": "affine+gated"}}
    base = write_checkpoint(tmp_path / "base", **kind)
    init_family(tmp_path / "fam", base)
    made = quantize(
        Wish(family=str(tmp_path / "fam"), name="low", format="m1v4g32", data=str(calibration), **QUICK)
    )
    assert made.linear_bytes[0] > made.linear_bytes[1]
    model = load_modules(tmp_path / "fam", read_family(tmp_path / "fam"), ["low"], dtype=torch.bfloat16)[
        "low"
    ]
    names = {path.rpartition(".")[2] for path in coded_linears(model.model)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    low = LLM(tmp_path / "fam", members=["low"], dtype="float32", cache_mib=4)
    assert low.generate("add 1 and 2", member="low", max_tokens=4)[0].ids


def test_verify_member_takes_what_has_no_digests(tuned_family: Path) -> None:
    family = read_family(tuned_family)
    old = Family(family.modules, {"plain": Member("plain", family.row("plain"), "sun")}, family.tokenizer)
    verify_member(old, "plain")
