"""Training promises: what is learned is what will be served, by the right half, and nothing else moves."""

import copy
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from heliostat.build import Loaded
from heliostat.family import Row
from heliostat.linear.lora import parts_of
from heliostat.model.tokenizer import Tokenizer
from heliostat.model.transformer import Attention, Transformer
from heliostat.train.data import Example
from heliostat.train.objective import MemberMicro
from heliostat.train.sharing import _prompt_pass, lay_out, log_probabilities, speak
from tests.promises.toys import ROWS, make_engine, served_chances, toy_modules

ROW = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())


def example(*parts: int, seed: int = 0) -> Example:
    """Lengths of question, answer, question, answer ... as a conversation of tokens by chance."""
    chance = random.Random(f"{seed}{parts}")
    ids: list[int] = []
    answers: list[tuple[int, int]] = []
    for place, length in enumerate(parts):
        if place % 2:
            answers.append((len(ids), len(ids) + length))
        ids += [chance.randrange(3, 250) for _ in range(length)]
    return Example(tuple(ids), tuple(answers))


EXAMPLES = {
    "one turn": [example(6, 5)],
    "answers of one token": [example(4, 1), example(3, 1)],
    "prompts of one token": [example(1, 4), example(1, 1)],
    "turns": [example(5, 4, 3, 6), example(2, 1, 2, 1, 1, 5)],
    "padded": [example(9, 2), example(1, 1), example(3, 7, 2, 3), example(1, 2, 1, 1)],
}
KIND = pytest.mark.parametrize("examples", EXAMPLES.values(), ids=EXAMPLES.keys())


def by_place(
    examples: Sequence[Example], row: Row, modules: dict[str, Loaded]
) -> dict[tuple[int, int], float]:
    """(example, position) of what speaks -> log-probability, as training sees it."""
    layout = lay_out(examples, row)
    chances = log_probabilities(speak(layout, row, modules), layout.targets)
    return {tuple(place): float(c) for place, c in zip(layout.where.tolist(), chances, strict=True)}


def served(
    examples: Sequence[Example], row: Row, modules: dict[str, Loaded], tokenizer: Tokenizer
) -> dict[tuple[int, int], float]:
    """The same as serving says it, answer by answer, with the earlier turns as prompt."""
    found: dict[tuple[int, int], float] = {}
    for number, one in enumerate(examples):
        for start, stop in one.answers:
            engine = make_engine(modules, tokenizer)
            chances = served_chances(engine, row, one.ids[:start], one.ids[start:stop])
            found |= {(number, start - 1 + i): float(c) for i, c in enumerate(chances)}
    return found


# 6. The training loss is the sum of the served log-probabilities.


@ROW
@KIND
def test_training_and_serving_give_every_answer_token_the_same_chance(
    row: Row, examples: list[Example], modules: dict[str, Loaded], tokenizer: Tokenizer
) -> None:
    trained, said = by_place(examples, row, modules), served(examples, row, modules, tokenizer)
    assert trained.keys() == said.keys()
    for place, chance in said.items():
        assert trained[place] == pytest.approx(chance, abs=2e-4), place


@ROW
def test_the_loss_is_the_sum_of_served_log_probabilities(
    row: Row, modules: dict[str, Loaded], tokenizer: Tokenizer
) -> None:
    examples = EXAMPLES["padded"]
    loss = float(MemberMicro(lay_out(examples, row), row, modules).loss())
    assert loss == pytest.approx(-sum(served(examples, row, modules, tokenizer).values()), abs=2e-3)


@contextmanager
def learning(
    modules: dict[str, Loaded], own: str, *, checkpointing: bool = False
) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters of one module, with gradients on; all is as before at the end."""
    module = modules[own]
    parts = parts_of(module.model, own) if module.adapter else {"": module.model}
    found = {f"{path}.{n}": p for path, part in parts.items() for n, p in part.named_parameters()}
    models = {id(m.model): m.model for m in modules.values()}.values()
    for parameter in found.values():
        parameter.requires_grad_(True)
    for model in models:
        model.checkpointing = checkpointing
    try:
        yield found
    finally:
        for parameter in found.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        for model in models:
            model.checkpointing = False


def gradients(
    examples: Sequence[Example], row: Row, modules: dict[str, Loaded], own: str, *, again: bool
) -> tuple:
    with learning(modules, own, checkpointing=again) as parameters:
        loss = MemberMicro(lay_out(examples, row), row, modules).loss()
        if loss.requires_grad:  # of some answers the member says nothing
            loss.backward()
        return float(loss.detach()), {
            n: None if p.grad is None else p.grad.clone() for n, p in parameters.items()
        }


@ROW
def test_recomputing_activations_changes_neither_loss_nor_gradients(
    row: Row, modules: dict[str, Loaded]
) -> None:
    own = next(name for name in row.modules if name != "base")
    kept = gradients(EXAMPLES["padded"], row, modules, own, again=False)
    again = gradients(EXAMPLES["padded"], row, modules, own, again=True)
    assert again[0] == pytest.approx(kept[0], abs=1e-4)
    for name, gradient in kept[1].items():
        assert (gradient is None) == (again[1][name] is None), name
        if gradient is not None:
            torch.testing.assert_close(again[1][name], gradient, rtol=1e-4, atol=1e-5)


def test_activations_are_really_computed_again(
    modules: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    forward = Attention.forward

    def counting(self, *arguments):
        calls["attention"] += 1
        return forward(self, *arguments)

    monkeypatch.setattr(Attention, "forward", counting)
    for again, count in ((False, 4), (True, 8)):
        calls.clear()
        gradients(EXAMPLES["one turn"], ROWS["sun-a"], modules, "a", again=again)
        assert calls["attention"] == count


@ROW
def test_padding_and_company_change_no_gradient(row: Row, modules: dict[str, Loaded]) -> None:
    own = next(name for name in row.modules if name != "base")
    together = gradients(EXAMPLES["padded"], row, modules, own, again=False)
    apart = [gradients([one], row, modules, own, again=False) for one in EXAMPLES["padded"]]
    assert together[0] == pytest.approx(sum(loss for loss, _ in apart), abs=1e-3)
    for name, gradient in together[1].items():
        parts = [found[name] for _, found in apart if found[name] is not None]
        if gradient is None:
            assert not parts
        else:
            torch.testing.assert_close(gradient, torch.stack(parts).sum(0), rtol=1e-3, atol=1e-4)


def test_the_gradient_is_the_slope_of_the_loss(tiny_model: Transformer) -> None:
    """Through another module's passes too: finite differences in float64, one direction a row."""
    modules = toy_modules(tiny_model, dtype=torch.float64)
    for model in {id(m.model): m.model for m in modules.values()}.values():
        for part in model.modules():
            if hasattr(part, "a") and hasattr(part, "b"):
                part.double()
    for row in (ROWS["sun-a"], ROWS["sun-la"], ROWS["prefillshare-a"], ROWS["icarus-la"], ROWS["three-full"]):
        own = next(name for name in row.modules if name != "base")
        with learning(modules, own) as parameters:
            micro = MemberMicro(lay_out(EXAMPLES["turns"], row), row, modules)
            micro.loss().backward()
            chance = torch.Generator().manual_seed(0)
            way = {n: torch.randn(p.shape, generator=chance, dtype=p.dtype) for n, p in parameters.items()}
            slope = sum(float((p.grad * way[n]).sum()) for n, p in parameters.items() if p.grad is not None)
            step, losses = 1e-3, []
            with torch.no_grad():
                for sign in (1, -2):
                    for n, p in parameters.items():
                        p.add_(sign * step * way[n])
                    losses.append(float(micro.loss()))
                for n, p in parameters.items():
                    p.add_(step * way[n])
        assert slope == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=5e-2, abs=0.05), row


# 8. Gradient reaches what it should, and only that.


def touched(found: dict[str, Tensor | None]) -> set[str]:
    return {name for name, gradient in found.items() if gradient is not None and gradient.abs().max() > 0}


@pytest.mark.parametrize("own", ["a", "la"])
def test_through_the_frozen_decode_module_keys_and_values_of_every_layer_learn(
    own: str, modules: dict[str, Loaded]
) -> None:
    """SUN: without the first token, which P says itself, all that P learns comes through its K,V."""
    row = ROWS[f"sun-{own}"]
    with learning(modules, own) as parameters:
        layout = lay_out([example(6, 5)], row)
        chances = log_probabilities(speak(layout, row, modules), layout.targets)
        (-chances[layout.where[:, 1] > 5].sum()).backward()
        reached = touched({n: p.grad for n, p in parameters.items()})
    for layer in range(2):
        for part in ("k_proj", "v_proj"):
            assert any(f"layers.{layer}.self_attn.{part}" in name for name in reached), (layer, part)
    last = f"layers.1.self_attn.{'o_proj' if own == 'a' else 'q_proj'}"
    assert not any(last in name for name in reached)  # behind the last K,V nothing of P is heard


@pytest.mark.parametrize("own", ["a", "la"])
def test_who_only_speaks_learns_no_keys_and_values(own: str, modules: dict[str, Loaded]) -> None:
    _, found = gradients(EXAMPLES["turns"], ROWS[f"icarus-{own}"], modules, own, again=False)
    reached = touched(found)
    assert reached and not any(part in name for name in reached for part in ("k_proj", "v_proj"))
    assert any("q_proj" in name for name in reached) and any("down_proj" in name for name in reached)


@pytest.mark.parametrize("name", ["prefillshare-a", "prefillshare-la", "icarus-a", "icarus-la"])
def test_a_frozen_writer_leaves_no_tape(name: str, modules: dict[str, Loaded]) -> None:
    row = ROWS[name]
    own = next(n for n in row.modules if n != "base")
    with learning(modules, own):
        written, hidden = _prompt_pass(lay_out([example(6, 5)], row), modules[row.prompt_writer])
    assert not hidden.requires_grad
    assert written and not any(t.requires_grad for kv in written.values() for t in kv)


@ROW
def test_nothing_of_a_frozen_module_gets_a_gradient(row: Row, modules: dict[str, Loaded]) -> None:
    own = next(name for name in row.modules if name != "base")
    with learning(modules, own) as parameters:
        MemberMicro(lay_out(EXAMPLES["turns"], row), row, modules).loss().backward()
        mine = {id(p) for p in parameters.values()}
        for name in row.modules:
            assert all(p.grad is None for p in modules[name].model.parameters() if id(p) not in mine), name


# 10. No token runs through a module that its row does not ask for.


@ROW
@pytest.mark.parametrize("parts", [(6, 5), (4, 1), (1, 3), (5, 4, 3, 6), (1, 1)])
def test_training_runs_no_token_through_a_module_that_the_row_does_not_ask_for(
    row: Row, parts: tuple[int, ...], modules: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: Counter[str] = Counter()
    names = {(m.weights, m.adapter): name for name, m in modules.items()}
    weights = {id(m.model): m.weights for m in modules.values()}
    forward = Transformer.forward

    def counting(self, ids, positions, attend, route=None, tape=None):
        ((adapter, _, _),) = route
        seen[names[weights[id(self)], adapter]] += ids.numel()
        return forward(self, ids, positions, attend, route, tape)

    monkeypatch.setattr(Transformer, "forward", counting)
    layout = lay_out([example(*parts)], row)
    speak(layout, row, modules)
    wanted = {name: count for name, count in layout.tokens.items() if count}
    if row.boundary(parts[0]) == 0 and len(parts) == 2 and row.answer_writer != row.prompt_writer:
        seen -= Counter({row.prompt_writer: 1})  # an empty prompt is padded to one token
    assert dict(seen) == wanted
    assert wanted == expected_tokens(row, example(*parts))


def expected_tokens(row: Row, one: Example) -> dict[str, int]:
    """Tokens of each module, counted from the table: every position once for its writer, once for who speaks."""
    counts: Counter[str] = Counter()
    last = one.answers[-1]
    goes_on = row.answer_writer == row.prompt_writer
    counts[row.prompt_writer] += last[1] - 1 if goes_on else row.boundary(last[0])
    later = sum(stop - 1 - max(row.boundary(start), start - 1) for start, stop in one.answers)
    if not goes_on:
        counts[row.answer_writer] += later
    if row.speaker != row.answer_writer:
        counts[row.speaker] += later
    return {name: count for name, count in counts.items() if count}


# 13. bfloat16: training and serving agree within a stated bound.

BOUND = 0.1
"""Nats a token, between log-probabilities of training and of serving in bfloat16, on average over a batch."""


@pytest.mark.parametrize("name", [n for n in ROWS if "three" not in n])
def test_in_bfloat16_training_and_serving_agree_within_the_bound(
    name: str, tiny_model: Transformer, tokenizer: Tokenizer
) -> None:
    """Training: own module in float32 under autocast, frozen ones in bfloat16. Serving: all in bfloat16."""
    wide, narrow = toy_modules(tiny_model), toy_modules(tiny_model, dtype=torch.bfloat16)
    mixed = {**narrow, "a": wide["a"], "b": wide["b"]}
    row, examples = ROWS[name], EXAMPLES["padded"]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        trained = by_place(examples, row, mixed)
    said = served(examples, row, narrow, tokenizer)
    apart = torch.tensor([abs(trained[place] - said[place]) for place in said])
    assert apart.mean() < BOUND and apart.max() < 6 * BOUND, (apart.mean(), apart.max())
    exact = served(examples, row, copy.copy(wide), tokenizer)
    rounding = torch.tensor([abs(exact[place] - said[place]) for place in said])
    assert apart.mean() < 3 * rounding.mean() + 0.01  # and no further than bfloat16 itself is from float32
