"""The promises on bases whose attention is no softmax: every row, cached, preempted, recorded, apart, trained, saved.

The reference keeps no sums: it adds up the values that each query sees, whoever wrote them.
"""

import copy
import random
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from heliostat.build import Loaded, init_family, read_family
from heliostat.check import check_family
from heliostat.clock import run_virtual
from heliostat.engine.request import Sampling
from heliostat.errors import Refused
from heliostat.export import export_member, import_member
from heliostat.llm import LLM
from heliostat.model.alpha import Weighing
from heliostat.model.config import config_json, read_config
from heliostat.model.tokenizer import Tokenizer
from heliostat.model.weights import load_transformer, read_tensors, save_checkpoint, state_of, weight_files
from heliostat.ops import native
from heliostat.train.recipe import Recipe
from heliostat.train.spellings import make_recipe
from heliostat.train.tune import tune
from heliostat.train.watch import Silent
from tests.conftest import SHARED
from tests.promises.crews import crowd, make_worker, order_of
from tests.promises.test_disaggregation import everyone, jobs_of
from tests.promises.test_graphs import recording
from tests.promises.test_serving import mixed_jobs, text
from tests.promises.test_training import EXAMPLES, by_place, gradients, served
from tests.promises.toys import (
    PAGE,
    ROWS,
    Exactness,
    Job,
    Served,
    make_engine,
    reference,
    serve,
    served_logits,
    toy_modules,
)

KINDS: dict[str, dict[str, Any]] = {
    "affine": {"kind": "affine"},
    "fixed": {"kind": "affine", "n": "fixed", "length": 256},
    "affine+gated": {"kind": "affine+gated"},
    "sink": {"kind": "sink"},
    "constant": {"kind": "affine", "alpha": "constant"},
    "gated": {"kind": "gated"},
}
SUMMED = ("affine+gated", "sink")
"""The kinds that every promise is held for: the first is all that affine is, and more."""


@pytest.fixture(scope="module")
def base_of(make_checkpoint: Callable[..., Path]) -> Callable[[str], Path]:
    """The folder of a toy base with such attention."""
    return cache(lambda name: make_checkpoint(model_type="heliostat_llama", attention=KINDS[name]))


@pytest.fixture(scope="module")
def modules_of(base_of: Callable[[str], Path]) -> Callable[[str], dict[str, Loaded]]:
    """Toy modules on such a base. Read only."""

    @cache
    def made(name: str) -> dict[str, Loaded]:
        folder = base_of(name)
        return toy_modules(load_transformer(folder, read_config(folder), dtype=torch.float32))

    return made


@pytest.fixture(scope="module")
def one_by_one(
    modules_of: Callable[[str], dict[str, Loaded]], tokenizer: Tokenizer
) -> Callable[[str], list[Served]]:
    """The answers to ``mixed_jobs``, each by an engine that has seen nothing else."""
    return cache(
        lambda name: [
            serve(make_engine(modules_of(name), tokenizer, pages=16), [job])[0] for job in mixed_jobs()
        ]
    )


@pytest.fixture(params=["kernels", "torch"])
def bodies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiled kernels and without."""
    if request.param == "torch":
        monkeypatch.setattr(native, "attends", lambda keys: False)
    elif not native.built():
        pytest.skip("the kernels are not built")


@pytest.mark.usefixtures("bodies")
@pytest.mark.parametrize("kind", KINDS)
def test_paged_logits_are_those_of_whole_sequences(
    kind: str, modules_of: Callable[[str], dict[str, Loaded]], tokenizer: Tokenizer
) -> None:
    modules = modules_of(kind)
    for name in ROWS if kind in SUMMED else ("independent-a", "sun-la"):
        for length in (1, PAGE, 2 * PAGE + 1):
            prompt, said = text(length), text(2 * PAGE, seed=3)
            got = served_logits(make_engine(modules, tokenizer), ROWS[name], prompt, said)
            want = reference(ROWS[name], modules, [*prompt, *said], length)
            torch.testing.assert_close(got, want, rtol=0, atol=2e-4, msg=f"{name} {length}")


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_another_function_than_softmax(
    kind: str, modules_of: Callable[[str], dict[str, Loaded]], modules: dict[str, Loaded]
) -> None:
    row, ids = ROWS["independent-a"], [*text(6), *text(6, seed=1)]
    ours, theirs = (reference(row, some, ids, 6) for some in (modules_of(kind), modules))
    assert (ours - theirs).abs().max() > 0.1


@pytest.mark.parametrize("kind", SUMMED)
def test_mixed_cached_preempted_and_in_small_chunks_are_one_by_one(
    kind: str,
    modules_of: Callable[[str], dict[str, Loaded]],
    one_by_one: Callable[[str], list[Served]],
    tokenizer: Tokenizer,
    exactness: Exactness,
) -> None:
    modules, want = modules_of(kind), one_by_one(kind)
    engine = make_engine(modules, tokenizer, pages=1000)
    first, again = serve(engine, mixed_jobs()), serve(engine, mixed_jobs())
    assert sum(s.cached for s in again) > sum(s.cached for s in first) > 0
    crowded = serve(make_engine(modules, tokenizer, pages=9), mixed_jobs())
    assert sum(s.preemptions > 0 for s in crowded) >= 5
    chunks = serve(make_engine(modules, tokenizer, max_tokens_per_step=5, max_running=5), mixed_jobs())
    for got in (first, again, crowded, chunks):
        exactness.same_served(got, want)


@pytest.mark.usefixtures("bodies")
@pytest.mark.parametrize("kind", SUMMED)
def test_recorded_passes_are_those_that_run_as_they_are(
    kind: str,
    modules_of: Callable[[str], dict[str, Loaded]],
    one_by_one: Callable[[str], list[Served]],
    tokenizer: Tokenizer,
    exactness: Exactness,
) -> None:
    engine = recording(modules_of(kind), tokenizer, pages=24)
    exactness.same_served(serve(engine, mixed_jobs()), one_by_one(kind))
    assert engine.runner.graphs is not None and engine.runner.graphs.replays > 20


@pytest.mark.parametrize("kind", SUMMED)
def test_pages_that_change_workers_bring_their_sums(
    kind: str, modules_of: Callable[[str], dict[str, Loaded]], tokenizer: Tokenizer, exactness: Exactness
) -> None:
    modules = modules_of(kind)
    engine = make_engine(modules, tokenizer)
    jobs = random.Random(3).sample(jobs_of(ROWS, sampled=True), 40)
    alone = serve(engine, jobs)

    async def apart() -> None:
        first, second = (
            make_worker(half, tokenizer, name=part, pages=60)
            for half, part in zip(everyone(modules), ("prefill", "decode"), strict=True)
        )
        found = await crowd([order_of(job, engine.digests) for job in jobs], second, first, tries=2000)
        for ours, theirs in zip(found, alone, strict=True):
            exactness.same(ours.ids, theirs.ids, theirs.gaps)
            if ours.ids == theirs.ids:
                assert ours.chances == pytest.approx(theirs.logprobs, abs=1e-4)
        store = first.core.engine.store
        assert store is not None and (store.form.tail_bytes > 0) == (kind != "sink")
        await first.close()
        await second.close()

    run_virtual(apart())


def test_a_page_whose_sums_were_changed_on_the_way_is_not_what_was_promised(
    modules_of: Callable[[str], dict[str, Loaded]], tokenizer: Tokenizer
) -> None:
    async def told() -> None:
        worker = make_worker(modules_of("affine"), tokenizer)
        engine = worker.core.engine
        serve(engine, [Job(ROWS["independent-a"], text(2 * PAGE + 1))])
        store = engine.store
        assert store is not None
        page = next(p for p in range(engine.table.pages) if engine.runner.pool.sums[:, p].any())
        before = store.digest(page)
        engine.runner.pool.sums[0, page, 0, 0] += 1
        assert store.digest(page) != before
        await worker.close()

    run_virtual(told())


def test_sums_follow_what_both_writers_wrote(
    modules_of: Callable[[str], dict[str, Loaded]], tokenizer: Tokenizer
) -> None:
    """A page of two writers is full of both: its sum is that of its slots, and of the pages before."""
    engine = make_engine(modules_of("affine"), tokenizer)
    serve(engine, [Job(ROWS["sun-a"], text(PAGE + 2), Sampling(max_tokens=2 * PAGE, ignore_eos=True))])
    pool = engine.runner.pool
    full = [p for p in range(engine.table.pages) if pool.sums[:, p].any()]
    assert len(full) >= 3
    ends = {p: pool.sums[:, p] - pool.values[:, p].sum(1) for p in full}  # what each goes on from
    begun = [p for p in full if ends[p].abs().max() < 1e-5]
    assert len(begun) == 1
    for page in full:
        if page not in begun:
            assert any(
                (ends[page] - pool.sums[:, other]).abs().max() < 1e-4 for other in full if other != page
            )


@pytest.mark.parametrize("kind", SUMMED)
@pytest.mark.parametrize("name", ROWS)
def test_training_gives_every_answer_token_the_chance_that_serving_gives(
    kind: str, name: str, modules_of: Callable[[str], dict[str, Loaded]], tokenizer: Tokenizer
) -> None:
    for examples in (EXAMPLES["padded"], EXAMPLES["turns"])[: 1 + (kind == "affine+gated")]:
        trained = by_place(examples, ROWS[name], modules_of(kind))
        said = served(examples, ROWS[name], modules_of(kind), tokenizer)
        assert trained.keys() == said.keys()
        for place, chance in said.items():
            assert trained[place] == pytest.approx(chance, abs=3e-4), place


def test_gradients_reach_the_writer_through_the_sums(modules_of: Callable[[str], dict[str, Loaded]]) -> None:
    """Where the speaker's alpha is 0, only sums are left of what it reads: the writer's values learn, its keys do not."""
    modules = {n: copy.deepcopy(modules_of("constant")[n]) for n in ("a", "base")}

    def silent(self: Weighing, found: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.zeros_like(self.alpha_ma)

    for again in (False, True):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Weighing, "_alpha", silent)
            _, slopes = gradients(EXAMPLES["one turn"], ROWS["sun-a"], modules, "a", again=again)
        last = ".model.layers.1.self_attn."
        assert slopes[f"{last}v_proj.weight"].abs().max() > 1e-4
        assert not slopes[f"{last}k_proj.weight"].any()


@pytest.mark.parametrize("kind", KINDS)
def test_saved_is_loaded(kind: str, base_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = base_of(kind)
    config = read_config(folder)
    model = load_transformer(folder, config, dtype=torch.bfloat16)
    save_checkpoint(tmp_path / "again", state_of(model), config_json(config))
    assert read_config(tmp_path / "again") == config
    again = load_transformer(tmp_path / "again", config, dtype=torch.bfloat16)
    state = state_of(again)
    assert all(torch.equal(tensor, state[name]) for name, tensor in state_of(model).items())
    averages = [tensor for name, tensor in state.items() if name.endswith("alpha_ma")]
    assert len(averages) == (config.layers if config.attention.affine else 0)
    assert all(average.dtype is torch.float32 for average in averages)


@pytest.fixture(scope="module")
def family(base_of: Callable[[str], Path], tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family on an affine and gated base, with a member of each sharing, of all tuners."""
    folder = tmp_path_factory.mktemp("affine") / "fam"
    init_family(folder, base_of("affine+gated"))
    for member, (sharing, tuner) in {**SHARED, "thin": ("sun", "paca")}.items():
        facts = {
            "family": str(folder),
            "member": member,
            "sharing": sharing,
            "data": str(tiny_data),
            "tuner": tuner,
        }
        dropped = {"dropbp": 0.5} if member == "solo" else {}
        recipe = make_recipe(
            Recipe, {**facts, "learning_rate": 0.03, "max_length": 128, "max_steps": 2, **dropped}
        )
        tune(recipe, watching=lambda job: nullcontext(Silent()))
    return folder


def test_a_family_on_such_a_base_is_tuned_checked_and_exported(family: Path, tmp_path: Path) -> None:
    assert [finding for finding in check_family(family) if not finding.ok] == []
    base = dict(read_tensors(weight_files(family / "base")))
    own = dict(read_tensors(weight_files(family / read_family(family).module("math.own").path)))
    assert own.keys() == base.keys()
    for name, tensor in base.items():
        assert own[name].dtype == tensor.dtype
        if name.endswith("alpha_ma"):  # frozen where a member is tuned
            assert torch.equal(own[name], tensor)
    assert any(not torch.equal(own[n], base[n]) for n in base if n.endswith("alpha_proj.weight"))
    assert any(not torch.equal(own[n], base[n]) for n in base if n.endswith("head_gate.weight"))
    out = export_member(family, "solo", tmp_path / "solo")
    card = (out / "README.md").read_text()
    assert (
        "Only heliostat runs it: its attention is `affine+gated`" in card
        and "transformers: `python" not in card
    )
    assert not (out / "reproduce.py").exists() and read_config(out).attention.name == "affine+gated"
    import_member(family, "again", out)
    assert LLM(family, members=["again"], dtype="float32").generate(
        "add 2 and 3", member="again", max_tokens=5
    )


def test_what_was_pretrained_with_other_options_cannot_join(
    family: Path, base_of: Callable[[str], Path]
) -> None:
    with pytest.raises(Refused, match='attention is {"kind": "affine", "n": "fixed", "length": 256'):
        import_member(family, "other", base_of("fixed"))
