"""`check` reads every byte, holds training against serving, and tells what another row would cost."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from heliostat import check
from heliostat.build import (
    Loaded,
    load_modules,
    load_tokenizer,
    module_digest,
    modules_of,
    read_family,
    write_family,
)
from heliostat.check import AGREE, Finding, check_family, spoken_log_probabilities
from heliostat.errors import Refused
from heliostat.family import Family
from heliostat.llm import LLM
from heliostat.train.data import answered_by


def found(folder: Path, **options: object) -> dict[str, Finding]:
    return {finding.name: finding for finding in check_family(folder, **options)}  # type: ignore[arg-type]


def flip(path: Path) -> None:
    """Another last byte; size and time stay."""
    content, stamp = bytearray(path.read_bytes()), path.stat()
    content[-1] ^= 0xFF
    path.write_bytes(bytes(content))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def test_a_good_family_is_good_in_every_row(tiny_family: Path) -> None:
    findings = found(tiny_family)
    modules = {f"module {name}" for name in ("base", "solo.own", "math.own", "code.own", "plan.own")}
    members = {f"member {name}" for name in ("solo", "math", "code", "plan")}
    assert findings.keys() == {*modules, "tokenizer", *members}
    assert all(finding.ok for finding in findings.values())
    assert all("training and serving differ by at most" in findings[name].text for name in members)


@pytest.mark.parametrize("spoiled", ["base", "math.own", "plan.own"])
def test_a_changed_byte_is_found_even_behind_an_old_time(tiny_family: Path, spoiled: str) -> None:
    (path,) = (tiny_family / read_family(tiny_family).module(spoiled).path).glob("*.safetensors")
    flip(path)
    findings = found(tiny_family)
    wrong = {name for name, finding in findings.items() if not finding.ok}
    assert wrong == {f"module {spoiled}", "members"}  # an adapter on it is named there, by its member
    assert "not tried (solo, math, code, plan)" in findings["members"].text
    told = findings[f"module {spoiled}"].text
    assert "its files have" in told and ("heliostat init" in told) == (spoiled == "base")
    assert ("code, math, plan" in told) == (spoiled == "base")
    assert "tokenizer" not in findings and "member math" not in findings  # nothing is run with such weights


@pytest.mark.parametrize("broken", ["base", "plan.own"])
def test_numbers_that_are_none_are_a_finding(tiny_family: Path, broken: str) -> None:
    family = read_family(tiny_family)
    (path,) = (tiny_family / family.module(broken).path).glob("*.safetensors")
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[3] = torch.nan
    save_file(tensors, path)
    digest = module_digest(tiny_family, family, broken, fresh=True)
    data = family.to_json()
    data["modules"][broken]["digest"] = digest
    write_family(tiny_family, Family.from_json(data))
    told = found(tiny_family)[f"module {broken}"]
    assert not told.ok and f"{name} holds 1 numbers that are not finite" in told.text


def test_a_missing_file_is_a_finding(tiny_family: Path) -> None:
    (tiny_family / "modules" / "math.own" / "model.safetensors").unlink()
    findings = found(tiny_family)
    assert not findings["module math.own"].ok and "model.safetensors" in findings["module math.own"].text
    assert findings["module solo.own"].ok


def test_a_changed_tokenizer_is_a_finding(tiny_family: Path) -> None:
    template = tiny_family / "base" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    finding = found(tiny_family)["tokenizer"]
    assert not finding.ok and "changed" in finding.text and "put the original files back" in finding.text


def test_a_member_whose_weights_were_exchanged_is_found(tiny_family: Path) -> None:
    data = read_family(tiny_family).to_json()
    data["members"]["code"]["digests"]["base"] = "0" * 64
    write_family(tiny_family, Family.from_json(data))
    findings = found(tiny_family)
    assert [name for name, finding in findings.items() if not finding.ok] == ["member code"]
    assert "tune it again" in findings["member code"].text


def test_where_training_and_serving_part_it_says_so(
    tiny_family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = spoken_log_probabilities

    def shifted(*arguments: object) -> list[float]:
        return [chance - 2 * AGREE for chance in honest(*arguments)]  # type: ignore[arg-type]

    monkeypatch.setattr(check, "spoken_log_probabilities", shifted)
    findings = found(tiny_family, members=["math"])
    assert not findings["member math"].ok and findings["module math.own"].ok


@pytest.mark.parametrize("member", ["solo", "math", "code", "plan"])
def test_chances_are_those_that_were_served(tiny_family: Path, member: str) -> None:
    family = read_family(tiny_family)
    names = modules_of(family, [member])
    modules: dict[str, Loaded] = load_modules(tiny_family, family, names, dtype=torch.float32)
    llm = LLM.of(modules, {member: family.row(member)}, load_tokenizer(tiny_family, family))
    prompt = "add 1 and 2"
    answer = llm.generate(prompt, member=member, max_tokens=7, ignore_eos=True, logprobs=0)[0]
    example = answered_by(llm.prompt_ids(prompt), answer.ids)
    trained = spoken_log_probabilities(example, family.row(member), modules)
    assert trained == pytest.approx(answer.logprobs, abs=1e-4) and len(trained) == 7


# --as


def test_another_row_is_measured(tiny_family: Path, tiny_data: Path) -> None:
    told = found(tiny_family, members=["solo"], sharing="prefillshare")["solo as prefillshare"]
    assert told.ok and "nats an answer token on 4 of its own answers" in told.text
    told = found(tiny_family, members=["solo"], sharing="sun", data=tiny_data, metric="exact")["solo as sun"]
    assert "accuracy " in told.text and "(exact)" in told.text
    before, after = losses(told)
    assert before != after


def test_the_row_it_has_is_skipped(tiny_family: Path) -> None:
    told = found(tiny_family, members=["math"], sharing="sun")["math as sun"]
    assert told.ok and told.text == "skipped, it has that sharing already"


def test_a_member_tuned_alone_is_no_half(
    bare_family: Path, tiny_data: Path, tune_member: Callable[..., object]
) -> None:
    tune_member(bare_family, "solo", "independent", tiny_data, max_steps=40)
    told = found(bare_family, members=["solo"], sharing="sun", data=tiny_data)["solo as sun"]
    before, after = losses(told)
    assert after > before + 0.5 and told.text.endswith("train it for this row instead")


def losses(finding: Finding) -> tuple[float, float]:
    before, after = finding.text.partition("loss ")[2].split(" nats")[0].split(" -> ")
    return float(before), float(after)


def test_what_has_no_module_of_its_own_has_no_other_row(bare_family: Path) -> None:
    data = read_family(bare_family).to_json()
    row = dict.fromkeys(("prompt_writer", "answer_writer", "speaker", "first_speaker"), "base")
    facts = {"sharing": "independent", "digests": {}, "recipe": {}, "evaluation": {}}
    data["members"]["plain"] = {"row": row, **facts}
    (bare_family / "family.json").write_text(json.dumps(data))
    told = found(bare_family, sharing="sun")["plain as sun"]
    assert not told.ok and "0 modules of its own" in told.text


def test_wishes_that_mean_nothing_are_refused(tiny_family: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="did you mean 'math'"):
        found(tiny_family, members=["mth"])
    with pytest.raises(Refused, match="no sharing 'moon'"):
        found(tiny_family, sharing="moon")
    with pytest.raises(Refused, match="is no family"):
        found(tmp_path)
