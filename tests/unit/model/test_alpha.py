"""The moving average of alpha: one step for each optimizer step, of what was seen for the first time, by all processes."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from heliostat.model.alpha import MIDDLE, RHO, SLOPE, settle
from heliostat.model.config import parse_config
from heliostat.model.seam import Causal
from heliostat.model.transformer import Branches, Transformer
from tests.unit.model.test_attention_kind import SHAPE


def model_of(**own: Any) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(parse_config({**SHAPE, "attention": {"kind": "affine", **own}}))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 61, (count, 7), generator=torch.Generator().manual_seed(seed))


def run(model: Transformer, batch: Tensor, **options: Any) -> Tensor:
    return model(batch, torch.arange(batch.shape[1]).expand_as(batch), Causal(), **options)


def averages(model: Transformer) -> list[Tensor]:
    return [block.self_attn.alpha_ma.clone() for block in model.blocks]


def means(model: Transformer, batches: Sequence[Tensor]) -> list[Tensor]:
    """The mean of alpha over all tokens of some batches, by block, from the inputs of its Linear."""
    found: list[list[Tensor]] = [[] for _ in model.blocks]
    hooks = [
        block.self_attn.alpha_proj.register_forward_hook(
            lambda part, given, made, own=own: own.append((SLOPE * made + MIDDLE).clamp(0, 1).flatten(0, -2))
        )
        for block, own in zip(model.blocks, found, strict=True)
    ]
    with torch.no_grad():
        for batch in batches:
            run(model, batch)
    for hook in hooks:
        hook.remove()
    return [torch.cat(own).mean(0) for own in found]


@pytest.mark.parametrize("again", [False, True])
def test_one_step_whatever_the_micro_batches_and_however_often_they_are_computed(again: bool) -> None:
    model = model_of()
    batches = [ids(2), ids(3, 1), ids(1, 2)]
    want = means(model, batches)
    before = averages(model)
    assert all(not average.any() for average in before)
    model.checkpointing = again
    for batch in batches:
        run(model, batch).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(averages(model), before, strict=True))  # not yet
    counted = [int(block.self_attn._seen[-1]) for block in model.blocks]  # type: ignore[index]
    assert counted == [6 * 7] * 2
    settle(model)
    for got, mean in zip(averages(model), want, strict=True):
        torch.testing.assert_close(got, (1 - RHO) * mean, rtol=1e-5, atol=1e-7)
    once = averages(model)
    settle(model)  # nothing was seen since
    assert all(torch.equal(a, b) for a, b in zip(averages(model), once, strict=True))


def test_a_second_step_keeps_nine_tenths() -> None:
    model = model_of()
    first, second = (means(model, [ids(4, seed)]) for seed in (0, 1))
    for seed in (0, 1):
        run(model, ids(4, seed)).sum().backward()
        settle(model)
    # The first block's input knows no average yet.
    want = RHO * (1 - RHO) * first[0] + (1 - RHO) * second[0]
    torch.testing.assert_close(averages(model)[0], want, rtol=1e-5, atol=1e-7)


def test_nothing_moves_it_in_eval_or_where_no_gradient_is_wanted() -> None:
    model = model_of()
    model.eval()
    run(model, ids(2)).sum().backward()
    model.train()
    with torch.no_grad():
        run(model, ids(2))
    run(model, ids(2), tape=tuple([Branches(attention=False)] * 2)).sum()
    before = averages(model)
    settle(model)
    assert all(torch.equal(a, b) for a, b in zip(averages(model), before, strict=True))


def test_processes_average_over_all_their_tokens() -> None:
    """What two ranks saw is summed; each moves as one process that saw both would."""
    one, two, both = model_of(), model_of(), model_of()
    run(one, ids(4)).sum().backward()
    run(two, ids(1, 5)).sum().backward()
    for batch in (ids(4), ids(1, 5)):
        run(both, batch).sum().backward()
    settle(both)
    seen: dict[str, Tensor] = {}
    settle(two, lambda own: seen.setdefault("two", own.clone()) * 0)  # adds up to nothing: it stays
    assert all(not average.any() for average in averages(two))
    settle(one, lambda own: own + seen["two"])
    for got, want in zip(averages(one), averages(both), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


def test_a_constant_alpha_is_a_half_and_its_average_goes_there() -> None:
    model = model_of(alpha="constant")
    assert not any("alpha_proj" in name for name, _ in model.named_parameters())
    for _ in range(60):
        run(model, ids(1)).sum().backward()
        settle(model)
    for average in averages(model):
        torch.testing.assert_close(average, torch.full_like(average, 0.5), rtol=0, atol=1e-3)


def test_softmax_has_nothing_to_settle() -> None:
    model = Transformer(parse_config({**SHAPE, "attention": {"kind": "sink"}}))
    settle(model, lambda seen: pytest.fail("there is nothing to add up"))
