"""Labels are what full forwards say: for every row, every place, one whole pass for each token that is tried."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat.build import Loaded
from heliostat.family import Row
from heliostat.judging import voice
from heliostat.judging.labels import score
from heliostat.model.attention_kind import KEY, PREFIX, AttentionKind
from heliostat.model.config import parse_config
from heliostat.model.seam import Causal, Reading
from heliostat.model.transformer import Transformer
from tests.conftest import SHAPE
from tests.promises.toys import ROWS, reference

PROMPT, ANSWER = (7, 8, 9, 10, 11), (21, 22, 23, 24, 25, 26, 27)


def brute_force(
    row: Row,
    modules: Mapping[str, Loaded],
    prompt: Sequence[int],
    answer: Sequence[int],
    place: int,
    token: int,
    suffix: int,
) -> float:
    """The score of one token by two whole passes of the reference, which keeps nothing."""

    def logprob(ids: Sequence[int]) -> torch.Tensor:
        said = reference(row, modules, [*prompt, *ids], len(prompt)).double().log_softmax(-1)
        return said[torch.arange(len(ids)), torch.tensor(ids)][place:].sum()

    behind = list(answer[place + 1 : place + 1 + suffix])
    before = list(answer[:place])
    return float(logprob([*before, token, *behind]) - logprob([*before, answer[place], *behind]))


@pytest.mark.parametrize("name", ROWS)
def test_scores_of_every_row_are_those_of_whole_passes(name: str, modules: dict[str, Loaded]) -> None:
    row, draft = ROWS[name], modules["c"]
    scored = score(row, modules, draft, PROMPT, ANSWER, suffix=3)
    first = 0 if row.first_speaker == row.speaker else 1
    drafted = reference(Row("c", "c", "c", "c"), modules, [*PROMPT, *ANSWER], len(PROMPT)).argmax(-1).tolist()
    places = [i for i in range(len(ANSWER)) if drafted[i] != ANSWER[i]]
    assert scored.places.tolist() == [place for place in places if place >= first]
    assert len(scored) >= 4
    for place, token, found in zip(
        *(t.tolist() for t in (scored.places, scored.tokens, scored.scores)), strict=True
    ):
        assert token == drafted[place]
        wanted = brute_force(row, modules, PROMPT, ANSWER, place, token, 3)
        assert found == pytest.approx(wanted, abs=2e-3, rel=1e-3), (place, token)


@pytest.mark.parametrize("together", [1, 30, 10_000])
@pytest.mark.parametrize("name", ["independent-a", "sun-a", "icarus-la"])
def test_a_twin_is_asked_over_the_speakers_own_keys_and_values(
    name: str, together: int, modules: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One place at a time, over what stands before it: as it drafts when it reads the speaker's pages."""
    monkeypatch.setattr(voice, "TOGETHER", together)
    heard, draft = voice.Voice(ROWS[name], modules, PROMPT, ANSWER), modules["c"]
    ids, found = torch.tensor([[*PROMPT, *ANSWER]]), []
    for place in range(len(PROMPT) - 1, len(PROMPT) + len(ANSWER) - 1):
        before = {layer: (k[:, :place], v[:, :place]) for layer, (k, v) in heard.written.items()}
        seam = Reading([before], torch.ones(1, 1, 1, place + 1, dtype=torch.bool), own=True)
        at = torch.tensor([[place]])
        found.append(int(draft.model.logits(draft.run(ids[:, place : place + 1], at, seam))[0, 0].argmax()))
    size = draft.model.config.vocabulary
    assert voice.top_tokens_over(heard, draft, vocabulary=size) == found
    assert found != voice.top_tokens(draft, PROMPT, ANSWER, vocabulary=size)
    scored = score(ROWS[name], modules, draft, PROMPT, ANSWER, reads=True)
    assert scored.tokens.tolist() == [
        token for i, token in enumerate(found) if i >= heard.first and token != ANSWER[i]
    ]


def a_module(seed: int, attention: str = "softmax", **shape: object) -> Loaded:
    """A toy of random weights in float64."""
    torch.manual_seed(seed)
    kind = AttentionKind(attention)
    own = {} if kind.plain else {"model_type": f"{PREFIX}llama", KEY: kind.to_json()}
    model = Transformer(parse_config({**SHAPE, "vocab_size": 48, **shape, **own})).double()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return Loaded(f"m{seed}", f"digest {seed}", f"m{seed}", model.eval().requires_grad_(False))


@pytest.mark.parametrize("attention", ["softmax", "affine+gated"])
@settings(max_examples=12, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 47), min_size=1, max_size=6),
    answer=st.lists(st.integers(0, 47), min_size=1, max_size=9),
    suffix=st.integers(1, 12),
    together=st.sampled_from([1, 40, 10_000]),
)
def test_scores_and_states_in_double_precision(
    attention: str, prompt: list[int], answer: list[int], suffix: int, together: int
) -> None:
    speaker, draft = a_module(1, attention), a_module(2, num_hidden_layers=1)
    row = Row("s", "s", "s", "s")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(voice, "TOGETHER", together)
        scored = score(row, {"s": speaker}, draft, prompt, answer, suffix=suffix)

    def run(module: Loaded, ids: list[int]) -> torch.Tensor:
        hidden: torch.Tensor = module.model(torch.tensor([ids]), torch.arange(len(ids))[None], Causal())[0]
        return hidden

    for place in range(len(answer)):
        so_far = [*prompt, *answer[:place]]
        token = int(draft.model.logits(run(draft, so_far)[-1]).argmax())
        if token == answer[place]:
            assert place not in scored.places.tolist()
            continue
        at = scored.places.tolist().index(place)
        behind = answer[place + 1 : place + 1 + suffix]
        chances = []
        for tried in (token, answer[place]):
            hidden = run(speaker, [*so_far, tried, *behind])
            said = speaker.model.logits(hidden).log_softmax(-1)
            wanted = torch.tensor([tried, *behind])
            chances.append(said[len(so_far) - 1 : -1].gather(1, wanted[:, None]).sum())
        assert int(scored.tokens[at]) == token
        assert float(scored.scores[at]) == pytest.approx(float(chances[0] - chances[1]), abs=1e-4)
        state = run(speaker, [*so_far, token])[-1]
        torch.testing.assert_close(scored.hidden[at].double(), state, rtol=1e-4, atol=1e-5)
    assert scored.places.tolist() == sorted(set(scored.places.tolist()))
