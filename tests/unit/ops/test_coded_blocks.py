"""All blocks in one call with weights in codebooks against the transformer's own loop: codes looked up, and dense copies."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from heliostat.linear.codebook import coded_linears, put_codebook
from heliostat.model.transformer import Transformer
from heliostat.ops import codebook_product, native
from heliostat.ops.codebook_product import ByRows
from heliostat.ops.native import coded as kernel
from tests.unit.ops.test_blocks import ALL, KINDS, MIXED, adapted, model_of, run, worn
from tests.unit.ops.test_codebook import coded_of

pytestmark = pytest.mark.skipif(
    not (native.built() and kernel.built()), reason="the compiled kernels do not run here"
)
SOME = ("q_proj", "v_proj", "up_proj", "o_proj")
Few = Callable[[int], None]


def coded(model: Transformer, *, names: tuple[str, ...], form: str) -> None:
    """Put those Linears of every block into codebooks."""
    for path, part in list(model.named_modules()):
        if path.rpartition(".")[2] in names and isinstance(part, nn.Linear):
            put_codebook(model, path, coded_of(form, part.out_features, part.in_features, seed=len(path)))


def inside(form: str, names: tuple[str, ...] = ALL) -> Callable[[Transformer], None]:
    return partial(coded, names=names, form=form)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Few:
    """Sets up to how many rows codes are looked up, by the blocks and by the loop alike."""

    def put(rows: int) -> None:
        monkeypatch.setattr("heliostat.model.transformer.rows_looked_up", lambda products, dtype: rows)
        monkeypatch.setattr(codebook_product, "most_rows", lambda *shape: rows)

    return put


@pytest.mark.parametrize("form", ["m1v4g32", "m2v8g16", "m1v4grow", "m3v5g10"])
@pytest.mark.parametrize("names", [ALL, SOME], ids=["all", "some"])
@pytest.mark.parametrize("rows", [0, 100], ids=["dense", "looked up"])
def test_at_once_is_one_by_one(form: str, names: tuple[str, ...], rows: int, few: Few) -> None:
    few(rows)
    model = model_of("qwen2", torch.bfloat16, finish=inside(form, names))  # with biases
    assert isinstance(model.at_once, ByRows) and len(coded_linears(model)) == 3 * len(names)
    for got, want in zip(run(model, laid=True), run(model, laid=False), strict=True):
        torch.testing.assert_close(got.float(), want.float(), rtol=0.1, atol=0.1)
    kept = [part.product.bytes for part in coded_linears(model).values()]
    assert all(bool(own["packed"]) == bool(rows) and bool(own["dense"]) != bool(rows) for own in kept)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_codes_that_are_looked_up_are_what_they_stand_for(kind: str, few: Few) -> None:
    found = []
    for rows in (0, 100):
        few(rows)
        found.append(run(model_of(kind, torch.bfloat16, finish=inside("m2v4g16")), laid=True)[0].float())
    assert 0 < (found[0] - found[1]).norm() < 0.02 * found[0].norm()


@pytest.mark.parametrize("attention", KINDS, ids=str)
def test_in_every_kind_of_attention(attention: dict[str, object], few: Few) -> None:
    few(100)
    model = model_of("llama", torch.bfloat16, attention, finish=inside("m1v4g32"))
    for got, want in zip(run(model, laid=True), run(model, laid=False), strict=True):
        torch.testing.assert_close(got.float(), want.float(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("names", [ALL, SOME], ids=["all", "some"])
def test_adapters_ride_on_them(names: tuple[str, ...], few: Few) -> None:
    few(100)
    model = adapted("qwen2", torch.bfloat16, finish=inside("m1v4g32", names))
    for part in coded_linears(model).values():  # they have 16 bits of another kind
        part.codebooks, part.scales = part.codebooks.half(), part.scales.half()
    at_once, loop = (worn(model, MIXED, laid=laid).float() for laid in (True, False))
    assert model.wardrobe(MIXED, model._linears, torch.bfloat16, rows=21), "it did not go through the loop"
    torch.testing.assert_close(at_once, loop, rtol=0.12, atol=0.12)
    bare = worn(model, ((None, 0, 21),), laid=True).float()
    assert torch.equal(at_once[:3], bare[:3]) and not torch.allclose(at_once[-1], bare[-1], atol=0.05)


@pytest.mark.parametrize("names", [ALL, SOME], ids=["all", "some"])
def test_a_number_of_threads_changes_no_bit(names: tuple[str, ...], few: Few) -> None:
    few(100)
    model = model_of("llama", torch.bfloat16, finish=inside("m1v4g16", names))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            found.append(run(model, laid=True)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


@torch.inference_mode()
def test_a_dense_copy_is_made_once_for_the_blocks_and_for_the_loop(few: Few) -> None:
    few(0)
    model = model_of("llama", torch.bfloat16, finish=inside("m1v4g32"))
    run(model, laid=True)
    found = coded_linears(model)
    inner = [found[f"model.layers.0.self_attn.{name}"] for name in ("q_proj", "k_proj", "v_proj")]
    copies = [part.product.dense(torch.bfloat16) for part in inner]
    assert len({copy.untyped_storage().data_ptr() for copy in copies}) == 1
    for part, copy in zip(inner, copies, strict=True):
        assert torch.equal(copy, part.coded.dense(torch.bfloat16))
    assert all(part.product.bytes["packed"] == 0 for part in inner)


def test_in_float32_codes_are_never_looked_up() -> None:
    model = model_of("llama", torch.float32, finish=inside("m1v4g32"))
    for got, want in zip(run(model, laid=True), run(model, laid=False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert all(part.product.bytes["packed"] == 0 for part in coded_linears(model).values())
