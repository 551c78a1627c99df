"""Which drafted tokens become part of an answer, by the logits of the pass that read them.

The speaker chooses a token at every place as if nothing had been drafted, by the request's own noise for that place. A
drafted token that is this one is taken, and the next place is looked at; the first that is not ends the turn, and what
the speaker chose is said instead. Behind drafted tokens that were all taken stands one more of the speaker's own.

That is exact, whatever was drafted: a proposal d is a point mass, so speculative sampling accepts it with probability
p(d) and else draws from p without d (arXiv 2211.17192), and one number, the place's noise, decides both. So a seed gives
the same answer with drafts as without, wherever turns begin and end. Other rules take tokens that the speaker did not
choose.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, takewhile

import torch
from torch import Tensor

from heliostat.engine.request import Request
from heliostat.engine.sampler import Draw, Sampled, reads, report, sample
from heliostat.engine.speculation.drafting import Drafted
from heliostat.engine.speculation.rule import LOSSLESS
from heliostat.model.judge import Judge

Wish = Callable[[Request, Sequence[int]], Draw]
"""How a request's next token is to be chosen, behind so many more of its answer."""
NOTHING = Drafted()
FORBIDDEN = -100.0
"""A bias that no token is taken against."""


@dataclass(slots=True)
class Turn:
    """What one request says in one step."""

    request: Request
    row: int
    """Its first row among those that speak; the others follow it."""
    drafted: Drafted
    scores: Sequence[float] = ()
    """A judge's, of each drafted token; one above ``theta`` will do."""
    theta: float = math.inf
    said: list[Sampled] = field(default_factory=list)
    judged: int = 0

    @property
    def ids(self) -> list[int]:
        """Token ids that it said."""
        return [sampled.token for sampled in self.said]

    @property
    def accepted(self) -> int:
        """Drafted tokens among those it said."""
        pairs = zip(self.ids, self.drafted.tokens, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    @property
    def proposal(self) -> int | None:
        """The drafted token for the place it stands at; None behind the last."""
        place = len(self.said)
        return self.drafted.tokens[place] if place < len(self.drafted.tokens) else None


def turns_of(requests: Sequence[Request], drafts: Mapping[str, Drafted]) -> list[Turn]:
    """Turns of requests that stand once for each of their rows, as a runner returns them."""
    found: list[Turn] = []
    for row, request in enumerate(requests):
        if not found or found[-1].request is not request:
            found.append(Turn(request, row, drafts.get(request.id, NOTHING)))
    return found


def choose(turns: Sequence[Turn], logits: Tensor, highest: Sequence[int], wish: Wish) -> None:
    """Have every turn say what it can, by ``logits`` [N, V]; ``highest``: where the highest of each row stands."""
    left = list(turns)
    while left:
        rows = [turn.row + len(turn.said) for turn in left]
        draws = [wish(turn.request, turn.ids) for turn in left]
        tops = [highest[row] for row in rows]
        if any(map(reads, draws)):
            drawn = sample(logits if len(rows) == len(logits) else logits[rows], draws, tops)
        else:
            drawn = list(map(Sampled, tops))
        left = [
            turn
            for turn, draw, chosen in zip(left, draws, drawn, strict=True)
            if _says(turn, draw, chosen, logits, highest, wish)
        ]


def _says(
    turn: Turn, draw: Draw, chosen: Sampled, logits: Tensor, highest: Sequence[int], wish: Wish
) -> bool:
    """Add a token to what a turn says; whether another may follow."""
    proposal = turn.proposal
    taken = proposal == chosen.token
    if (
        proposal is not None
        and not taken
        and _may(draw, proposal)
        and _tolerates(turn, draw, logits, highest, wish)
    ):
        row = logits[turn.row + len(turn.said)][None]
        (chosen,) = report(row, [proposal], [draw])
        turn.judged += 1
        taken = True
    turn.said.append(chosen)
    ends = chosen.token in draw.eos and not draw.sampling.ignore_eos
    return taken and not ends


def _may(draw: Draw, token: int) -> bool:
    """Whether a token is one of those to choose from: no rule takes what is forbidden."""
    if token in draw.eos and len(draw.answer) < draw.sampling.min_tokens:
        return False
    if draw.sampling.logit_bias.get(token, 0.0) <= FORBIDDEN:
        return False
    if draw.allowed is None:
        return True
    return token // 8 < len(draw.allowed) and bool(draw.allowed[token // 8] >> token % 8 & 1)


def _tolerates(turn: Turn, draw: Draw, logits: Tensor, highest: Sequence[int], wish: Wish) -> bool:
    """Whether the request's rule takes the proposal, which the speaker did not choose."""
    rule = turn.request.speculation or LOSSLESS
    place = len(turn.said)
    row, proposal = logits[turn.row + place], turn.drafted.tokens[place]
    bound = math.inf if rule.bound is None else rule.bound
    if rule.kind == "judged":
        return bool(turn.scores) and turn.scores[place] > turn.theta
    if rule.kind == "topk":
        return int((row > row[proposal]).sum()) < bound
    if rule.kind == "kl":
        return divergence(row, turn.drafted.logits[place]) < bound
    if rule.kind == "entropy":
        # Nothing goes on behind an end, and no grammar may be asked what would.
        ends = proposal in draw.eos and not draw.sampling.ignore_eos
        return not ends and entropy(row) > bound and _goes_on(turn, rule.window, logits, highest, wish)
    return False


def _goes_on(turn: Turn, window: int, logits: Tensor, highest: Sequence[int], wish: Wish) -> bool:
    """Whether the next ``window`` drafted tokens are what the speaker says behind the proposal."""
    place, tokens = len(turn.said), turn.drafted.tokens
    if place + window >= len(tokens):
        return False
    for ahead in range(place + 1, place + 1 + window):
        row = turn.row + ahead
        draw = wish(turn.request, [*turn.ids, *tokens[place:ahead]])
        (chosen,) = sample(logits[row][None], [draw], [highest[row]])
        if chosen.token != tokens[ahead] or (chosen.token in draw.eos and ahead < place + window):
            return False
    return True


def divergence(target: Tensor, draft: Tensor) -> float:
    """KL divergence (nats) of the draft's distribution from the speaker's, both of logits [V], in float32."""
    size = min(len(target), len(draft))
    p, q = (row[:size].float().log_softmax(-1) for row in (target, draft.to(target.device)))
    return float((p.exp() * (p - q)).sum())


def entropy(logits: Tensor) -> float:
    """Of the distribution of logits [V], as a share of the highest that V tokens can have."""
    p = logits.float().log_softmax(-1)
    return float(-(p.exp() * p).nan_to_num().sum() / math.log(len(logits)))


def judge_turns(
    turns: Sequence[Turn], states: Sequence[Tensor], judge_of: Callable[[Request], tuple[Judge, float] | None]
) -> None:
    """Score the drafted tokens of requests that have a judge, by ``states`` [n, E] of each pass's rows that speak.

    ``judge_of``: a request's judge and threshold. A drafted token is judged by the state behind it, where it is the
    input.
    """
    starts = [0, *accumulate(len(some) for some in states)]
    waiting: dict[tuple[int, int], tuple[Judge, list[Turn]]] = {}
    for turn in turns:
        found = judge_of(turn.request) if turn.drafted.tokens else None
        if found is not None:
            judge, turn.theta = found
            number = bisect_right(starts, turn.row) - 1
            waiting.setdefault((number, id(judge)), (judge, []))[1].append(turn)
    for (number, _), (judge, some) in waiting.items():
        counts = [len(turn.drafted.tokens) for turn in some]
        firsts = [turn.row - starts[number] + 1 for turn in some]
        rows = [first + n for first, count in zip(firsts, counts, strict=True) for n in range(count)]
        scores = judge.scores(states[number][torch.tensor(rows, device=states[number].device)])
        for turn, own in zip(some, scores.split(counts), strict=True):
            turn.scores = own.tolist()
