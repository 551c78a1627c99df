"""Modules in codebooks beside plain ones, in one engine and between workers: rows answer as what the codes stand for."""

import copy
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from heliostat.build import Loaded
from heliostat.clock import run_virtual
from heliostat.family import SHARINGS, Row
from heliostat.linear.codebook import coded_linears, put_codebook
from heliostat.model.tokenizer import Tokenizer
from heliostat.model.transformer import Transformer
from heliostat.ops.codebook_format import Format
from heliostat.quantize.blocks import linears_of
from heliostat.quantize.fit import Fit
from heliostat.quantize.starting import start
from tests.promises.crews import assert_empty, crowd, make_worker, order_of
from tests.promises.test_disaggregation import jobs_of
from tests.promises.toys import Exactness, adapt, make_engine, serve, served_logits

LOW = "low"
SUN, PREFILL, ICARUS = SHARINGS["sun"], SHARINGS["prefillshare"], SHARINGS["icarus"]
ROWS: Mapping[str, Row] = {
    "plain": SUN.instantiate("a"),
    "spoken": SUN.instantiate("a", SUN.replaced(speaker=LOW)),
    "spoken to another": SUN.instantiate("b", SUN.replaced(speaker=LOW)),
    "written": PREFILL.instantiate("b", PREFILL.replaced(writer=LOW)),
    "ridden": ICARUS.instantiate("lq", ICARUS.replaced(writer=LOW)),
    "alone": Row(LOW, LOW, LOW, LOW),
    "adapted alone": Row("lq", "lq", "lq", "lq"),
}


def low_of(model: Transformer, *, dense: bool) -> Transformer:
    """The model with all Linears of its blocks in codebooks, or with what those stand for."""
    made, chance = copy.deepcopy(model), torch.Generator().manual_seed(4)
    form = Format.parse("m1v4g32")
    for number, block in enumerate(made.blocks):
        for path, linear in linears_of(block).items():
            coded = Fit(form, *start(linear.weight.detach(), form, chance)).coded()
            if dense:
                linear.weight.data.copy_(coded.dense(torch.float32))
            else:
                put_codebook(made, f"model.layers.{number}.{path}", coded)
    return made


def beside(modules: Mapping[str, Loaded], model: Transformer, *, dense: bool) -> dict[str, Loaded]:
    """The toys, the low module, and an adapter on it."""
    low = low_of(model, dense=dense)
    adapt(low, "lq", seed=31)
    ours = {LOW: Loaded(LOW, "digest of low", LOW, low), "lq": Loaded("lq", "digest of lq", LOW, low, "lq")}
    return {**modules, **ours}


@pytest.fixture(scope="module")
def coded(modules: dict[str, Loaded], tiny_model: Transformer) -> dict[str, Loaded]:
    return beside(modules, tiny_model, dense=False)


@pytest.mark.parametrize("joined", [False, True])
def test_mixed_over_plain_and_low_modules_as_one_by_one_over_what_the_codes_stand_for(
    joined: bool,
    modules: dict[str, Loaded],
    tiny_model: Transformer,
    tokenizer: Tokenizer,
    exactness: Exactness,
) -> None:
    jobs = jobs_of(ROWS)
    twins = beside(modules, tiny_model, dense=True)
    wanted = [serve(make_engine(twins, tokenizer), [job])[0] for job in jobs]
    mixed = beside(modules, tiny_model, dense=False)
    if joined:
        mixed[LOW].model.join()
    for ours, theirs in zip(serve(make_engine(mixed, tokenizer), jobs), wanted, strict=True):
        exactness.same(ours.ids, theirs.ids, theirs.gaps)


def test_asked_again_the_pages_of_a_low_writer_are_found(
    coded: dict[str, Loaded], tokenizer: Tokenizer, exactness: Exactness
) -> None:
    engine = make_engine(coded, tokenizer)
    jobs = [replace(job, prompt=job.prompt * 3) for job in jobs_of({"written": ROWS["written"]})]
    first, again = serve(engine, jobs), serve(engine, jobs)
    assert any(answer.cached for answer in again)
    for ours, theirs in zip(again, first, strict=True):
        exactness.same(ours.ids, theirs.ids, theirs.gaps)


def test_between_workers_that_host_only_their_half(
    coded: dict[str, Loaded], tokenizer: Tokenizer, exactness: Exactness
) -> None:
    engine, jobs = make_engine(coded, tokenizer), jobs_of(ROWS)
    alone = serve(engine, jobs)
    rows = ROWS.values()
    readers = {row.prompt_writer: coded[row.prompt_writer] for row in rows}
    speakers = {name: coded[name] for row in rows for name in (row.answer_writer, row.speaker)}

    async def apart() -> None:
        first, second = (
            make_worker(readers, tokenizer, name="prefill", credit=len(jobs)),
            make_worker(speakers, tokenizer, name="decode", credit=len(jobs)),
        )
        found = await crowd([order_of(job, engine.digests) for job in jobs], second, first)
        for ours, theirs in zip(found, alone, strict=True):
            assert ours.failures == ()
            exactness.same(ours.ids, theirs.ids, theirs.gaps)
        await assert_empty(first, second)
        await first.close()
        await second.close()

    run_virtual(apart())


@pytest.mark.parametrize("length", [1, 40], ids=["codes are looked up", "plain weights are read"])
def test_in_bfloat16_it_is_what_the_codes_stand_for_but_for_rounding(
    length: int, tiny_model: Transformer, tokenizer: Tokenizer
) -> None:
    prompt, answer, found = [7] * length, [9, 10, 11], []
    for dense in (False, True):
        model = low_of(tiny_model, dense=dense).to(torch.bfloat16)
        if not dense:  # codebooks and scales have 16 bits of their own
            for exact, part in zip(
                coded_linears(low_of(tiny_model, dense=False)).values(),
                coded_linears(model).values(),
                strict=True,
            ):
                part.codebooks, part.scales = exact.codebooks, exact.scales
        model.join()
        engine = make_engine({LOW: Loaded(LOW, "digest of low", LOW, model)}, tokenizer)
        found.append(served_logits(engine, ROWS["alone"], prompt, answer).float())
    assert (found[0] - found[1]).norm() <= 0.03 * found[1].norm()
