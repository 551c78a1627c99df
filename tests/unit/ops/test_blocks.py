"""All blocks in one call of the kernels against the transformer's own loop: architectures, number formats, threads."""

from functools import partial

import pytest
import torch
from torch import nn

from heliostat.engine.paged import Paged, PagePool
from heliostat.linear.lora import adapter_of, add_adapter
from heliostat.model.config import parse_config
from heliostat.model.transformer import Transformer
from heliostat.ops import native
from heliostat.ops.native.blocks import Laid

pytestmark = pytest.mark.skipif(not native.built(), reason="the compiled kernels do not run here")
SHAPE = {
    "vocab_size": 40,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 72,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
}
ROWS, PAGE = 21, 4


def model_of(kind: str, dtype: torch.dtype) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(parse_config(SHAPE | {"model_type": kind}))
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    model = model.to(dtype).requires_grad_(False)
    model.join()
    return model


def seam_of(model: Transformer, *, laid: bool) -> Paged:
    """Two requests of 17 and 4 tokens; the second's last row only speaks, over what the row before it wrote."""
    pool = PagePool(model.config, pages=8, page_size=PAGE, dtype=model.dtype)
    pages, first = torch.tensor([3, 0, 7, 2, 5, 6]), 17
    writes = torch.arange(ROWS - 1)
    where = torch.cat((torch.arange(first), torch.arange(ROWS - 1 - first) + 5 * PAGE))
    slots = pages[where // PAGE] * PAGE + where % PAGE
    visible = torch.cat((torch.arange(1, first + 1), torch.tensor([1, 2, 3, 3])))
    starts, page_starts = torch.tensor([0, first, ROWS]), torch.tensor([0, 5])
    entries = native.Ragged(torch.arange(ROWS), visible, starts, pages, page_starts)
    everything = Laid(pool.keys, pool.values, writes, slots, entries) if laid else None
    ask = partial(native.attend, entries=entries)
    return Paged(pool, writes=writes, slots=slots, ask=ask, laid=everything)


def run(model: Transformer, *, laid: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states, and the keys that were written."""
    ids = torch.arange(ROWS)
    positions = torch.cat((torch.arange(17), torch.tensor([0, 1, 2, 2])))
    seam = seam_of(model, laid=laid)
    with torch.inference_mode():
        return model(ids, positions, seam), seam.pool.keys


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_at_once_is_one_by_one(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    model = model_of(kind, dtype)
    assert model.at_once is not None
    for got, want in zip(run(model, laid=True), run(model, laid=False), strict=True):
        torch.testing.assert_close(got.float(), want.float(), rtol=tolerance, atol=tolerance)


def test_a_number_of_threads_changes_no_bit() -> None:
    model, threads, found = model_of("llama", torch.bfloat16), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run(model, laid=True)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_rows_with_adapters_go_through_the_loop() -> None:
    model = model_of("llama", torch.float32)
    add_adapter(model, "one", r=2, alpha=4, targets=["q_proj", "down_proj"])
    for part in adapter_of(model, "one").values():
        nn.init.normal_(part.b)
    ids, positions = torch.arange(ROWS), torch.arange(ROWS)
    with torch.inference_mode():
        worn, bare, loop = (
            model(ids, positions, seam_of(model, laid=laid), ((name, 0, ROWS),))
            for name, laid in (("one", True), (None, True), ("one", False))
        )
    assert torch.equal(worn, loop) and not torch.allclose(worn, bare)
