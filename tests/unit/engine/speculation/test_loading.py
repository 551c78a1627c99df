"""From a name to who drafts: what is refused, by name and before anything is loaded, and what comes of the rest."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from heliostat.build import load_tokenizer, read_family, write_family
from heliostat.engine.plan import plan_of
from heliostat.engine.speculation.loading import drafting_of
from heliostat.engine.speculation.speculator import Drafting
from heliostat.engine.speculation.wanted import NGRAM, Wanted
from heliostat.errors import Refused
from heliostat.export import import_draft
from heliostat.family import Module
from heliostat.llm import LLM
from heliostat.model.judge import Judge, judge_name, write_judge
from tests.conftest import write_checkpoint

WIDTH = 32


@pytest.fixture
def family(bare_family: Path, tmp_path: Path) -> Path:
    """A base, and a smaller module of the same tokenizer."""
    source = write_checkpoint(tmp_path / "small", seed=5, hidden_size=16, num_hidden_layers=1)
    import_draft(bare_family, "small", source)
    return bare_family


def load(folder: Path, wanted: Wanted, speakers: tuple[str, ...] = ("base",)) -> Drafting | None:
    family = read_family(folder)
    tokenizer = load_tokenizer(folder, family)
    return drafting_of(wanted, folder, family, speakers, tokenizer=tokenizer, dtype=torch.float32)


def judge_of(folder: Path, *, speaker: str = "base", draft: str = "small") -> Judge:
    family = read_family(folder)
    digest = NGRAM if draft == NGRAM else family.module(draft).digest
    return Judge(
        torch.zeros(WIDTH), 0.0, family.module(speaker).digest, digest, 0.5, {"f1": 0.5}, speaker, draft
    )


def test_nobody_a_look_up_or_a_module(family: Path) -> None:
    assert load(family, Wanted()) is None
    looked = load(family, Wanted(draft=NGRAM, ahead=3))
    assert looked is not None and looked.module is None and looked.ahead == 3 and looked.name == NGRAM
    small = load(family, Wanted(draft="small"))
    assert small is not None and small.module is not None and not small.reads
    assert small.module.model.config.width == 16


def test_answers_are_the_same_with_a_module_of_another_shape(family: Path) -> None:
    asked: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True}
    plain = LLM(family, dtype="float32").generate("hello world", **asked)[0]
    llm = LLM(family, dtype="float32", draft="small", adaptive=False)
    drafted, off = (
        llm.generate("hello world", **asked)[0],
        llm.generate("hello", speculation="off", **asked)[0],
    )
    assert drafted.ids == plain.ids and (drafted.rule, off.rule, plain.rule) == ("lossless", None, None)
    assert drafted.speculated.drafted > off.speculated.drafted == plain.speculated.drafted == 0
    assert "".join(llm.stream("hello world", speculation="off", **asked)) == plain.text
    with pytest.raises(Refused, match="'judged' is not allowed here"):
        llm.generate("hello", speculation="judged")
    with pytest.raises(Refused, match="'judged' is not allowed here"):
        next(iter(llm.stream("hello", speculation="judged")))


def test_a_draft_with_another_tokenizer_is_refused(family: Path, tmp_path: Path) -> None:
    few = write_checkpoint(tmp_path / "few", vocab_size=20)
    shutil.rmtree(family / "modules" / "small")
    shutil.copytree(few, family / "modules" / "small")
    forget_digest(family, "small")
    with pytest.raises(Refused, match="draft 'small' knows 20 tokens.*draft with ngram"):
        load(family, Wanted(draft="small"))
    other = write_checkpoint(tmp_path / "other")
    told = json.loads((other / "tokenizer.json").read_text())
    told["model"]["vocab"] = dict(
        zip(told["model"]["vocab"], reversed(told["model"]["vocab"].values()), strict=True)
    )
    (other / "tokenizer.json").write_text(json.dumps(told))
    shutil.rmtree(family / "modules" / "small")
    shutil.copytree(other, family / "modules" / "small")
    forget_digest(family, "small")
    with pytest.raises(Refused, match="draft 'small' has another tokenizer than the family"):
        load(family, Wanted(draft="small"))


def forget_digest(folder: Path, name: str) -> None:
    """Take a module's files as they are now."""
    from heliostat.build import describe_module

    family = read_family(folder)
    module: Module = describe_module(folder, name, f"modules/{name}", base=None, family=family)
    write_family(folder, family.with_module(module))


def test_a_draft_whose_files_changed_is_refused(family: Path) -> None:
    file = next((family / "modules" / "small").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(Refused, match="module 'small' changed"):
        load(family, Wanted(draft="small"))


def test_judges_are_read_for_the_speakers_that_have_one(family: Path) -> None:
    wanted = Wanted(draft="small", verify=("judged",))
    with pytest.raises(Refused, match="has no judge 'base-small'"):
        load(family, wanted)
    judge = judge_of(family)
    write_judge(family, judge_name("base", "small"), judge)
    found = load(family, wanted, ("base", "small"))
    assert found is not None and set(found.judges) == {judge.speaker}
    write_judge(family, "mine", judge_of(family, draft=NGRAM))
    looked = load(family, Wanted(draft=NGRAM, verify=("judged",), judge="mine"))
    assert looked is not None and looked.judges[judge.speaker].draft == NGRAM


@pytest.mark.parametrize(("speaker", "draft"), [("small", "small"), ("base", "base"), ("base", NGRAM)])
def test_a_judge_of_others_is_refused_by_name(family: Path, speaker: str, draft: str) -> None:
    write_judge(family, "mine", judge_of(family, speaker=speaker, draft=draft))
    wrong = "speaker 'small'" if speaker == "small" else f"draft '{draft}'"
    with pytest.raises(Refused, match=f"this judge knows the {wrong}.*train another with heliostat judge"):
        load(family, Wanted(draft="small", verify=("judged",), judge="mine"))


def test_the_ledger_counts_a_drafts_weights_and_pages(family: Path) -> None:
    made = read_family(family)

    def lines(draft: str | None) -> dict[str, int]:
        plan = plan_of(
            family,
            made,
            ["base"],
            dtype=torch.float32,
            max_length=64,
            cache_mib=1,
            max_running=2,
            wanted=Wanted(draft=draft),
        )
        return dict(plan.ledger.lines)

    plain, looked, small, again = lines(None), lines(NGRAM), lines("small"), lines("base")
    logits = "logits of drafted tokens, at most"
    assert looked.items() - plain.items() == {(logits, 2 * 8 * 300 * 4)}
    assert looked.items() <= small.items()
    new = small.keys() - looked.keys()
    assert {what.split(" of ")[0] for what in new} == {"weights", "8 pages"}
    assert again.keys() - looked.keys() == {"8 pages of the draft base"}  # its weights are there
