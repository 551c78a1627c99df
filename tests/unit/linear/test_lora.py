"""Low-rank adapters as a way to be a Linear: many on one weight, chosen row by row."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from heliostat.linear.lora import (
    AdaptedLinear,
    Linear,
    Route,
    adapter_of,
    add_adapter,
    put_adapter,
    whole,
)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = Linear(6, 8), Linear(8, 6, bias=False)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: torch.Tensor, route: Route | None = None) -> torch.Tensor:
        return self.down_proj(self.up_proj(self.norm(x), route), route)


def adapted(names: tuple[str, ...] = ("one.own", "two.own")) -> AdaptedLinear:
    torch.manual_seed(0)
    layer = AdaptedLinear(Linear(6, 8))
    holder = nn.ModuleDict({"up_proj": layer})
    for name in names:
        part = put_adapter(holder, "up_proj", name, r=2, scale=0.5)
        nn.init.normal_(part.b)
    return layer.requires_grad_(False)


@st.composite
def routes(draw: st.DrawFn) -> list[tuple[str | None, int, int | None]]:
    """Consecutive segments over some rows, as a pass has them."""
    route: list[tuple[str | None, int, int | None]] = []
    start = 0
    for adapter in draw(
        st.lists(st.sampled_from([None, "one.own", "two.own", "not here"]), min_size=1, max_size=5)
    ):
        stop = start + draw(st.integers(1, 3))
        route.append((adapter, start, stop))
        start = stop
    return route


@given(routes(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_row_is_as_if_alone_with_its_adapter(route: list, inference: bool) -> None:
    layer = adapted()
    x = torch.randn(route[-1][2], 6)
    with torch.inference_mode(inference):
        got = layer(x, route)
    for adapter, start, stop in route:
        weight = layer.inner.weight
        if adapter and adapter != "not here":
            part = adapter_of(nn.ModuleDict({"x": layer}), adapter)["x"]
            weight = weight + part.scale * part.b @ part.a
        want = nn.functional.linear(x[start:stop], weight, layer.inner.bias)
        torch.testing.assert_close(got[start:stop], want, rtol=0, atol=1e-5)


def test_the_same_rows_through_two_segments_get_gradients_too() -> None:
    layer = adapted().requires_grad_(True)
    x = torch.randn(4, 6)
    layer(x, [("one.own", 0, 2), ("two.own", 2, 4)]).square().sum().backward()
    parts = [adapter_of(nn.ModuleDict({"x": layer}), name)["x"] for name in ("one.own", "two.own")]
    assert all(part.b.grad is not None and part.b.grad.abs().max() > 0 for part in parts)
    layer.zero_grad()
    layer(x[None], whole("one.own")).square().sum().backward()
    assert parts[1].b.grad is None


def test_a_fresh_adapter_adds_nothing_and_acts_only_where_it_is_worn() -> None:
    torch.manual_seed(0)
    model, x = Small(), torch.randn(3, 6)
    before = model(x)
    found = add_adapter(model, "m.own", r=2, alpha=4, targets=["up_proj", "down_proj"])
    assert found == ["down_proj", "up_proj"] == list(adapter_of(model, "m.own"))
    assert torch.equal(model(x, whole("m.own")), before)
    for part in adapter_of(model, "m.own").values():
        nn.init.normal_(part.b)
    assert not torch.equal(model(x, whole("m.own")), before)
    assert torch.equal(model(x), before) and torch.equal(model(x, whole(None)), before)


def test_the_scale_is_alpha_by_rank() -> None:
    model = Small()
    add_adapter(model, "m", r=4, alpha=16, targets=["up_proj"])
    assert adapter_of(model, "m")["up_proj"].scale == 16 / 4


def test_names_with_dots_and_slashes_stay_apart() -> None:
    layer = adapted(("a.b", "a-b", "a"))
    assert len(layer.adapters) == 3


def test_a_bfloat16_weight_with_a_float32_adapter_keeps_the_format_of_its_input() -> None:
    layer = adapted()
    layer.inner.bfloat16()
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    for route in (whole("one.own"), [(None, 0, 1), ("one.own", 1, 3)]):
        assert layer(x, route).dtype is torch.bfloat16
