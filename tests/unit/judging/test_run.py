"""From prompts to a judge in the family: what is written, what is kept, how it goes on, what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from heliostat.errors import Refused
from heliostat.judging import picture, run
from heliostat.judging.asked import load_pair, read_asked
from heliostat.judging.consequences import Question, Said, answered, known_unacceptable
from heliostat.judging.labels import Scored, score
from heliostat.judging.run import JUDGING, Judged, Wish, make_judge
from heliostat.model.judge import read_judge
from tests.unit.judging.conftest import add_draft


def wish(folder: Path, data: Path, **other: Any) -> Wish:
    usual = {"family": str(folder), "speaker": "base", "draft": "small", "data": str(data)}
    return Wish(**{**usual, "metric": "exact", "longest": 12, "calibration": 6, "suffix": 4, **other})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, drafted_made: Path, asked_data: Path) -> Judged:
    folder = Path(shutil.copytree(drafted_made, tmp_path_factory.mktemp("judged") / "fam"))
    return make_judge(wish(folder, asked_data, share=0.5, tau=-4.0))


def test_the_judge_is_in_the_family_and_knows_both(made: Judged, drafted: Path) -> None:
    judge = read_judge(made.path.parents[1], "base-small")
    pair = load_pair(drafted, "base", "small")
    judge.check(pair.speaker.digest, pair.draft.digest)
    assert torch.equal(judge.weight, made.judge.weight) and judge.theta == made.judge.thetas["recall"]
    assert set(judge.thetas) == {"recall", "f1"} and judge.report["tau"] == made.tau
    assert sum(made.tokens) == judge.report["labels"] > 20 and made.prompts == (16, 4)
    json.dumps(made.to_json())


def test_labels_come_from_the_scores_of_greedy_answers(made: Judged, drafted: Path, asked_data: Path) -> None:
    pair = load_pair(drafted, "base", "small")
    asked = read_asked(asked_data, pair, most=None, seed=0)
    said = answered(pair.llm, "base", [q.prompt for q in asked.held_out], [()] * 4, longest=[12] * 4)
    scored = [
        score(pair.row, pair.modules, pair.draft, q.prompt, s.ids, suffix=4)
        for q, s in zip(asked.held_out, said, strict=True)
    ]
    assert sum(map(len, scored)) == made.tokens[1]
    labels = torch.cat([s.scores for s in scored]) > made.tau
    point = made.points["f1"]
    taken = made.judge.scores(torch.cat([s.hidden for s in scored])) > point.theta
    assert float(taken.float().mean()) == pytest.approx(point.accepted)
    assert float((taken & labels).sum() / taken.sum().clamp_min(1)) == pytest.approx(point.precision)


def test_what_was_labelled_is_not_labelled_again(
    drafted: Path, asked_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[int] = []
    plain = run._scored

    def counting(pair: Any, question: Question, said: Said, suffix: int) -> Scored:
        if len(scored) == 9:
            raise KeyboardInterrupt  # as good as a kill: nothing is written afterwards
        scored.append(question.line)
        return plain(pair, question, said, suffix)

    monkeypatch.setattr(run, "_scored", counting)
    with pytest.raises(KeyboardInterrupt):
        make_judge(wish(drafted, asked_data, tau=-4.0))
    assert not (drafted / "judges").exists()
    first = list(scored)

    def noting(pair: Any, question: Question, said: Said, suffix: int) -> Scored:
        scored.append(question.line)
        return plain(pair, question, said, suffix)

    monkeypatch.setattr(run, "_scored", noting)
    whole = make_judge(wish(drafted, asked_data, tau=-4.0))
    assert sorted(scored) == list(range(1, 21)) and scored[:9] == first
    scored.clear()
    again = make_judge(wish(drafted, asked_data, tau=-3.0, recall=0.5))
    assert scored == [] and again.labels_folder == whole.labels_folder
    make_judge(wish(drafted, asked_data, tau=-4.0, suffix=2))
    assert len(scored) == 20 and len(list((drafted / JUDGING).iterdir())) == 2


def test_an_interrupted_run_ends_as_one_that_was_not(
    made: Judged, drafted: Path, asked_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, count = run._scored, [0]

    def once(*given: Any) -> Scored:
        count[0] += 1
        if count[0] == 7:
            raise KeyboardInterrupt
        return plain(*given)

    monkeypatch.setattr(run, "_scored", once)
    with pytest.raises(KeyboardInterrupt):
        make_judge(wish(drafted, asked_data, share=0.5, tau=-4.0))
    again = make_judge(wish(drafted, asked_data, share=0.5, tau=-4.0))
    torch.testing.assert_close(again.judge.weight, made.judge.weight, rtol=1e-3, atol=1e-5)
    assert again.tokens == made.tokens and again.points.keys() == made.points.keys()


def test_tau_comes_from_tokens_that_change_the_result(drafted: Path, asked_data: Path) -> None:
    heard: list[str] = []
    ending = {"member": "solo", "speaker": "solo.own", "longest": 60, "calibration": 16}
    found = make_judge(wish(drafted, asked_data, share=0.4, **ending), echo=heard.append)
    assert found.known > 0 and found.measured > 0
    assert any("the data has no answers" in line for line in heard)
    lower = make_judge(wish(drafted, asked_data, share=0.8, **ending))
    assert lower.tau < found.tau and lower.acceptable > found.acceptable


def test_labels_by_result_are_whether_the_result_stays(drafted: Path, asked_data: Path) -> None:
    ending = {"member": "solo", "speaker": "solo.own", "longest": 60, "labels": "result"}
    found = make_judge(wish(drafted, asked_data, **ending))
    assert found.tau == 0 and found.measured > 0
    assert found.acceptable == pytest.approx(1 - found.known / sum(found.tokens))
    with pytest.raises(Refused, match="tau -4.0 is for labels by suffix only"):
        wish(drafted, asked_data, tau=-4.0, **ending)


def test_a_token_is_unacceptable_where_the_answer_that_follows_has_another_result(drafted: Path) -> None:
    pair = load_pair(drafted, "solo.own", "small", member="solo")
    prompt = pair.llm.prompt_ids("add 2 and 3")
    (said,) = answered(pair.llm, "solo", [prompt], [()], longest=[200])
    assert said.ended
    scored = score(pair.row, pair.modules, pair.draft, prompt, said.ids)
    question = Question(1, prompt)
    (changed,) = known_unacceptable(pair.llm, "solo", [(question, said, scored)], metric="exact", longest=200)
    assert changed is not None and len(changed) == len(scored) > 0
    text = pair.llm.tokenizer.decode(said.ids)
    for place, token, differs in zip(scored.places.tolist(), scored.tokens.tolist(), changed, strict=True):
        begun = [*said.ids[:place], token]
        (other,) = answered(pair.llm, "solo", [prompt], [begun], longest=[200])
        assert list(other.ids[: place + 1]) == begun
        assert differs == (not other.ended or pair.llm.tokenizer.decode(other.ids).strip() != text.strip())


def test_a_wrong_answer_is_no_measure(drafted: Path) -> None:
    pair = load_pair(drafted, "base", "small")
    prompt = pair.llm.prompt_ids("add 2 and 3")
    said = Said((5, 6, pair.llm.tokenizer.eos_ids[0]), True)
    none = torch.zeros(0, dtype=torch.int64)
    nothing = Scored(none, none, torch.zeros(0), torch.zeros(0, 2))
    asked = [(Question(1, prompt, "something else"), said, nothing), (Question(2, prompt), said, nothing)]
    assert known_unacceptable(pair.llm, "base", asked, metric="exact", longest=9) == [None, []]


@pytest.mark.parametrize("member", ["math", "code", "plan", "solo"])
def test_a_member_of_every_sharing_can_be_judged(drafted: Path, asked_data: Path, member: str) -> None:
    pair_speaker = {"math": "base", "solo": "solo.own", "code": "code.own", "plan": "plan.own"}[member]
    found = make_judge(wish(drafted, asked_data, member=member, speaker=pair_speaker, tau=-4.0, name="m"))
    assert found.judge.speaker_module == pair_speaker and sum(found.tokens) > 0


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"draft": "base"}, "speaker and draft are both 'base'"),
        ({"draft": "gone"}, "no module 'gone'"),
        ({"speaker": "gone"}, "no module 'gone'"),
        ({"member": "code"}, "'code.own' speaks for member 'code', not 'base': say --speaker code.own"),
        ({"metric": "taste"}, "no metric 'taste'"),
        ({"choice": "f2"}, "way to choose theta"),
        ({"labels": "taste"}, "no kind of labels 'taste'"),
        ({"share": 1.5}, "share is 1.5"),
        ({"suffix": 0}, "suffix is 0"),
        ({"name": "../x"}, "no judge's name"),
        ({"prompts": 3}, "3 prompts that fit; a judge needs at least 5"),
        ({"tau": 1000.0}, "are unacceptable: there is nothing to tell apart"),
    ],
)
def test_what_cannot_be_judged_is_refused(
    drafted: Path, asked_data: Path, change: dict[str, Any], word: str
) -> None:
    with pytest.raises(Refused, match=word):
        make_judge(wish(drafted, asked_data, **{"tau": -4.0, **change}))


def test_empty_data_is_refused(drafted: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("", encoding="utf-8")
    with pytest.raises(Refused, match="empty"):
        make_judge(wish(drafted, empty))


def test_a_draft_with_another_tokenizer_is_refused(
    drafted: Path, asked_data: Path, make_checkpoint: Callable[..., Path]
) -> None:
    add_draft(drafted, "strange", make_checkpoint(seed=6))
    tokenizer = drafted / "modules" / "strange" / "tokenizer.json"
    content = json.loads(tokenizer.read_text(encoding="utf-8"))
    content["pre_tokenizer"] = None
    tokenizer.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(Refused, match="draft 'strange' has another tokenizer"):
        make_judge(wish(drafted, asked_data, draft="strange"))


def test_without_results_to_compare_it_says_what_is_needed(drafted: Path, asked_data: Path) -> None:
    with pytest.raises(Refused, match="a metric that tells a result from its wording.*--tau"):
        make_judge(wish(drafted, asked_data, calibration=0))


def test_an_answer_that_fills_the_context_is_left_as_it_is(drafted: Path) -> None:
    """No engine takes a request that nothing can follow; others go on."""
    pair = load_pair(drafted, "base", "small")
    prompt = pair.llm.prompt_ids("add 2 and 3")
    full = [5] * (pair.llm.engine.max_length - len(prompt))
    whole, other = answered(pair.llm, "base", [prompt, prompt], [full, [5]], longest=[9, 9])
    assert list(whole.ids) == full and not whole.ended
    assert len(other.ids) > 1


def test_answers_without_a_result_are_compared_by_their_words() -> None:
    question = Question(1, (1, 2), None)
    assert picture._right("command", "no call", question, "no call")
    assert not picture._right("command", "another", question, "no call")
