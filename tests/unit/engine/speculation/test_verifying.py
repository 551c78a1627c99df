"""Verified tokens: the lossless rule keeps the speaker's distribution whatever is drafted, and each rule is its twin."""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heliostat.engine.request import Request, Sampling
from heliostat.engine.sampler import Draw, sample
from heliostat.engine.speculation.drafting import Drafted
from heliostat.engine.speculation.rule import LOSSLESS, Rule, parse_rule
from heliostat.engine.speculation.verifying import choose, divergence, entropy, judge_turns, turns_of
from heliostat.family import Row
from heliostat.model.judge import Judge

V, EOS = 5, 4
MANY = 3000
UNLIKELY = 48.0
"""A chi-square with 4 degrees of freedom is above this once in a thousand million times."""
CHANCES = st.lists(st.floats(0.01, 1.0), min_size=V, max_size=V)
ROW = Row("a", "a", "a", "a")


def asked(rule: Rule = LOSSLESS, **wishes: object) -> Request:
    sampling = Sampling(**{"max_tokens": 50, "ignore_eos": True, **wishes})  # type: ignore[arg-type]
    return Request("r", row=ROW, digests={"a": "a"}, prompt=(1,), sampling=sampling, speculation=rule)


def wish_of(request: Request, said: Sequence[int] = ()) -> Draw:
    allowed = None if request.matcher is None else request.matcher.allowed([*request.answer, *said])
    return Draw(request.sampling, [*request.answer, *said], (EOS,), allowed)


def logits_of(chances: Sequence[float]) -> Tensor:
    return torch.tensor(chances).log()


# --- the distribution


Seeds = Sequence[int]


def always(seeds: Seeds, p: Tensor, q: Tensor) -> list[int]:
    return [0] * len(seeds)


def of_the_draft(seeds: Seeds, p: Tensor, q: Tensor) -> list[int]:
    """As a draft does: by its own distribution and the request's own noise."""
    draws = [Draw(Sampling(temperature=1.0, seed=seed), (), (EOS,)) for seed in seeds]
    return [sampled.token for sampled in sample(q.expand(len(seeds), -1), draws)]


def by_other_noise(seeds: Seeds, p: Tensor, q: Tensor) -> list[int]:
    return random.Random(1).choices(range(V), q.exp().tolist(), k=len(seeds))


def least_likely(seeds: Seeds, p: Tensor, q: Tensor) -> list[int]:
    return [int(p.argmin())] * len(seeds)


def overrated(seeds: Seeds, p: Tensor, q: Tensor) -> list[int]:
    return [int((q - p).argmax())] * len(seeds)


def knowing(seeds: Seeds, p: Tensor, q: Tensor) -> list[int]:
    """Has seen the noise, and drafts what will not be chosen: nothing worse can be drafted."""
    return [(chosen + 1) % V for chosen in of_the_draft(seeds, q, p)]


DRAFTERS = [always, of_the_draft, by_other_noise, least_likely, overrated, knowing]


@pytest.mark.parametrize("drafter", DRAFTERS, ids=lambda d: d.__name__)
@given(first=CHANCES, second=CHANCES, draft=CHANCES)
@settings(max_examples=4, derandomize=True)
def test_tokens_are_the_speakers_by_chance_whatever_is_drafted(
    drafter: Callable[[Seeds, Tensor, Tensor], list[int]],
    first: list[float],
    second: list[float],
    draft: list[float],
) -> None:
    p, then, q = (logits_of(chances).log_softmax(-1) for chances in (first, second, draft))
    requests = [asked(temperature=1.0, seed=seed) for seed in range(MANY)]
    for number, request in enumerate(requests):
        request.id = str(number)
    tokens = drafter(range(MANY), p, q)
    drafts = {r.id: Drafted([token]) for r, token in zip(requests, tokens, strict=True)}
    turns = turns_of([r for r in requests for _ in range(2)], drafts)
    logits = torch.stack([p, then]).repeat(MANY, 1)
    choose(turns, logits, [0] * len(logits), wish_of)
    assert chi_square(Counter(turn.ids[0] for turn in turns), p) < UNLIKELY
    taken = [turn for turn in turns if len(turn.said) == 2]
    assert all(turn.ids[0] == turn.drafted.tokens[0] and turn.accepted == 1 for turn in taken)
    assert all(turn.accepted == 0 for turn in turns if len(turn.said) == 1)
    if len(taken) > 300:  # the one behind them is the speaker's, too
        assert chi_square(Counter(turn.ids[1] for turn in taken), then) < UNLIKELY
    if drafter is knowing:
        assert not taken


def chi_square(seen: Counter[int], p: Tensor) -> float:
    total = sum(seen.values())
    return sum(
        (seen[token] - total * float(p[token].exp())) ** 2 / (total * float(p[token].exp()))
        for token in range(V)
    )


def test_the_test_finds_another_distribution() -> None:
    p = logits_of([0.3, 0.3, 0.2, 0.1, 0.1])
    wrong = Counter({0: 1080, 1: 720, 2: 600, 3: 300, 4: 300})
    assert chi_square(wrong, p) > UNLIKELY
    right = Counter({0: 900, 1: 900, 2: 600, 3: 300, 4: 300})
    assert chi_square(right, p) < 1


@given(rows=st.lists(CHANCES, min_size=2, max_size=5), seed=st.integers(0, 99), data=st.data())
@settings(max_examples=60)
def test_a_seed_says_the_same_with_drafts_as_without(
    rows: list[list[float]], seed: int, data: st.DataObject
) -> None:
    request = asked(temperature=0.9, seed=seed, top_p=0.9, presence_penalty=0.5)
    tokens = data.draw(st.lists(st.integers(0, V - 1), min_size=len(rows) - 1, max_size=len(rows) - 1))
    logits = torch.stack([logits_of(row) for row in rows])
    (turn,) = turns_of([request] * len(rows), {"r": Drafted(tokens)})
    choose([turn], logits, logits.argmax(-1).tolist(), wish_of)
    alone: list[int] = []
    for row in logits:
        alone.append(sample(row[None], [wish_of(request, alone)])[0].token)
        if len(alone) > len(tokens) or alone[-1] != tokens[len(alone) - 1]:
            break
    assert turn.ids == alone


# --- the other rules, and their twin: what they mean, written down for one greedy answer


def plain(
    rule: Rule,
    rows: Sequence[Sequence[float]],
    drafts: Sequence[Sequence[float]],
    tokens: list[int],
    scores: Sequence[float],
) -> list[int]:
    """What is said, by probabilities of the speaker [k + 1][V] and of the draft [k][V]."""
    said: list[int] = []
    best = [max(range(V), key=lambda t, row=row: (row[t], -t)) for row in rows]  # type: ignore[misc]
    for place, row in enumerate(rows):
        if place == len(tokens):
            return [*said, best[place]]
        token, q = tokens[place], drafts[place] if drafts else ()
        total = sum(row)
        p = [chance / total for chance in row]
        will_do = token == best[place]
        if rule.kind == "judged":
            will_do |= scores[place] > (rule.bound or 0)
        elif rule.kind == "topk":
            will_do |= sorted(p, reverse=True).index(p[token]) < (rule.bound or 0)
        elif rule.kind == "kl":
            q = [chance / sum(q) for chance in q]
            will_do |= sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) < (rule.bound or 0)
        elif rule.kind == "entropy":
            unsure = -sum(a * math.log(a) for a in p) / math.log(V) > (rule.bound or 0)
            window = range(place + 1, place + 1 + rule.window)
            will_do |= unsure and all(n < len(tokens) and tokens[n] == best[n] for n in window)
        if not will_do:
            return [*said, best[place]]
        said.append(token)
    raise AssertionError("a bonus token comes last")


@pytest.mark.parametrize(
    "rule", ["lossless", "judged:0.5", "topk:2", "kl:0.3", "entropy:0.8", "entropy:0.7:1"], ids=str
)
@given(data=st.data())
@settings(max_examples=60)
def test_each_rule_is_its_twin(rule: str, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 5))
    several = st.lists(CHANCES, min_size=count, max_size=count)
    rows, drafts = [*data.draw(several), data.draw(CHANCES)], data.draw(several)
    tokens = data.draw(st.lists(st.integers(0, V - 1), min_size=count, max_size=count))
    clear = st.floats(-3, 3).filter(lambda state: abs(state) > 1e-3)  # theta is where it is zero
    states = data.draw(st.lists(clear, min_size=count + 1, max_size=count + 1))
    request = asked(parse_rule(rule))
    logits = torch.stack([logits_of(row) for row in rows])
    drafted = Drafted(tokens, [logits_of(row) for row in drafts])
    (turn,) = turns_of([request] * len(rows), {"r": drafted})
    judge = Judge(torch.ones(1), 0.0, "s", "d", 0.5, {}, "s", "d")
    if request.speculation is not None and request.speculation.kind == "judged":
        judge_turns([turn], [torch.tensor(states)[:, None]], lambda _: (judge, 0.5))
    choose([turn], logits, logits.argmax(-1).tolist(), wish_of)
    scores = [1 / (1 + math.exp(-state)) for state in states[1:]]
    want = plain(parse_rule(rule), [row.exp().tolist() for row in logits], drafts, tokens, scores)
    assert turn.ids == want
    assert turn.judged <= turn.accepted == min(len(want) - 1, count) and (
        turn.judged == 0 or rule != "lossless"
    )


def test_measures_of_distributions() -> None:
    p, q = logits_of([0.5, 0.25, 0.25]), logits_of([0.25, 0.5, 0.25])
    assert divergence(p, p) == pytest.approx(0, abs=1e-6)
    assert divergence(p, q) == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(0.5), abs=1e-6)
    assert divergence(p, torch.cat([q, torch.tensor([9.0])])) == pytest.approx(divergence(p, q))  # padding
    assert entropy(torch.zeros(7)) == pytest.approx(1.0)
    assert entropy(torch.tensor([0.0, -math.inf])) == pytest.approx(0.0)


def test_a_judge_reads_the_state_behind_the_token() -> None:
    first, second = asked(parse_rule("judged")), asked(parse_rule("judged"))
    first.id, second.id = "first", "second"
    drafts = {"first": Drafted([1, 2]), "second": Drafted([3])}
    turns = turns_of([first, first, first, second, second], drafts)
    judge = Judge(torch.ones(1), 0.0, "s", "d", 0.5, {}, "s", "d")
    states = [torch.tensor([[9.0], [1.0], [-1.0]]), torch.tensor([[9.0], [2.0]])]  # of two passes
    judge_turns(turns, states, lambda _: (judge, 0.4))
    assert turns[0].scores == pytest.approx(torch.tensor([1.0, -1.0]).sigmoid().tolist())
    assert turns[1].scores == pytest.approx(torch.tensor([2.0]).sigmoid().tolist())
    assert {turn.theta for turn in turns} == {0.4}


class Only:
    """Allows these tokens alone."""

    def __init__(self, *tokens: int) -> None:
        self.bits = bytes([sum(1 << token for token in tokens)])

    def allowed(self, answer: Sequence[int]) -> bytes:
        return self.bits


@pytest.mark.parametrize(
    ("wishes", "matcher", "token"),
    [({"logit_bias": {2: -100.0}}, None, 2), ({"min_tokens": 3}, None, EOS), ({}, Only(0, 1), 2)],
)
def test_no_rule_takes_what_is_forbidden(wishes: dict, matcher: Only | None, token: int) -> None:
    request = asked(parse_rule("topk:5"), **{**wishes, "ignore_eos": matcher is None and token != EOS})
    request.matcher = matcher
    logits = torch.stack([logits_of([0.3, 0.2, 0.1, 0.2, 0.2])] * 2)
    for tokens, said in ([token], 1), ([1], 2):
        (turn,) = turns_of([request, request], {"r": Drafted(tokens)})
        choose([turn], logits, [0, 0], wish_of)
        assert len(turn.said) == said and token not in turn.ids[:1]


def test_log_probabilities_are_of_the_token_that_is_said() -> None:
    request = asked(parse_rule("topk:3"), logprobs=1)
    logits = torch.stack([logits_of([0.5, 0.3, 0.2, 0.01, 0.01])] * 2)
    (turn,) = turns_of([request, request], {"r": Drafted([2])})
    choose([turn], logits, [0, 0], wish_of)
    chances = logits.log_softmax(-1)[0]
    assert turn.ids == [2, 0] and turn.judged == 1
    assert [s.logprob for s in turn.said] == pytest.approx([float(chances[2]), float(chances[0])])
    assert [[token for token, _ in s.top] for s in turn.said] == [[0], [0]]
    assert [s.top[0][1] for s in turn.said] == pytest.approx([float(chances[0])] * 2)


def test_an_end_ends_the_turn() -> None:
    request = asked(ignore_eos=False)
    logits = torch.stack([logits_of([0.1, 0.1, 0.1, 0.1, 0.6])] * 3)
    (turn,) = turns_of([request] * 3, {"r": Drafted([EOS, EOS])})
    choose([turn], logits, [EOS] * 3, wish_of)
    assert turn.ids == [EOS] and turn.accepted == 1


def test_what_follows_an_end_is_not_looked_at() -> None:
    """A grammar that is asked behind its end would end the request."""

    def wish(request: Request, said: Sequence[int]) -> Draw:
        assert EOS not in said
        return wish_of(request, said)

    request = asked(parse_rule("entropy:0.1:1"), ignore_eos=False)
    logits = torch.stack([logits_of([0.4, 0.15, 0.15, 0.15, 0.15])] * 3)
    (turn,) = turns_of([request] * 3, {"r": Drafted([EOS, 0])})
    choose([turn], logits, [0] * 3, wish)
    assert turn.ids == [0] and turn.judged == 0
