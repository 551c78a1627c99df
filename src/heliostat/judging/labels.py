"""Labels from the speaker alone: how well its own answer would go on behind each token that the draft would have said.

Source: arXiv 2510.02329.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heliostat.build import Loaded
from heliostat.family import Row
from heliostat.judging.voice import Other, Voice, top_tokens, top_tokens_over

SUFFIX = 20
"""Tokens behind a token that its score looks at."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Tokens of one answer where the draft's choice is another than the speaker's. M of them."""

    places: Tensor  # [M] int64: in the answer
    tokens: Tensor  # [M] int64: what the draft would have said
    scores: Tensor  # [M] float32, nats: see ``score``
    hidden: Tensor  # [M, E] float32: the speaker's last state where the draft's token is the input

    def __len__(self) -> int:
        return len(self.places)


@torch.no_grad()
def score(
    row: Row,
    modules: Mapping[str, Loaded],
    draft: Loaded,
    prompt: Sequence[int],
    answer: Sequence[int],
    *,
    suffix: int = SUFFIX,
    reads: bool = False,
) -> Scored:
    """Every place i of the greedy ``answer`` y where the speaker speaks and the draft's likeliest token z is not y_i.

    Its score is [log P(z | y_<i) - log P(y_i | y_<i)] + [log P(y_i+1..i+N | y_<i, z) - log P(y_i+1..i+N | y_<=i)]
    with N = ``suffix``, or as many as the answer still has: 0 is as good as the speaker's own token. ``reads``: the
    draft reads the speaker's keys and values, as a twin of it in few bits does.
    """
    voice = Voice(row, modules, prompt, answer)
    speaker = modules[row.speaker].model
    size = speaker.config.vocabulary
    drafted = (
        top_tokens_over(voice, draft, vocabulary=size)
        if reads
        else top_tokens(draft, prompt, answer, vocabulary=size)
    )
    places = [i for i in range(voice.first, len(answer)) if drafted[i] != answer[i]]
    others = [Other(i, drafted[i], tuple(answer[i + 1 : i + 1 + suffix])) for i in places]
    own, theirs = voice.logprobs(answer), voice.logprobs(drafted)
    heard = voice.hear(others)
    at = torch.tensor(places, dtype=torch.int64, device=own.device)
    as_it_was = [own[other.place + 1 : other.place + 1 + len(other.suffix)].sum() for other in others]
    behind = torch.stack(as_it_was) if others else own[:0]
    scores = theirs[at] - own[at] + heard.suffixes - behind
    return Scored(
        at.cpu(),
        torch.tensor([other.token for other in others], dtype=torch.int64),
        scores.float().cpu(),
        heard.hidden.float().cpu(),
    )
