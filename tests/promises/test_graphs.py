"""Recorded decode passes give the answers of those that run as they are; here "recorded" is the function itself.

What a GPU adds is the recording alone: tests/gpu has that.
"""

import random
import weakref

import pytest
import torch

from heliostat.build import Loaded
from heliostat.engine import runner as running
from heliostat.engine.engine import Engine
from heliostat.engine.graphs import MOST_LAYOUTS, Run, as_it_is
from heliostat.engine.request import Sampling
from heliostat.engine.runner import Runner
from heliostat.model.tokenizer import Tokenizer
from heliostat.ops import decoding, native
from tests.promises.test_serving import mixed_jobs
from tests.promises.toys import PAGE, ROWS, Exactness, Job, make_engine, serve, toy_modules


def recording(
    modules: dict[str, Loaded],
    tokenizer: Tokenizer,
    *,
    pages: int = 400,
    record: object = as_it_is,
    **options: int,
) -> Engine:
    """An engine whose decode passes are recorded at first sight."""
    engine = make_engine(modules, tokenizer, pages=pages, **options)
    engine.runner = Runner(modules, pages=pages, page_size=PAGE, record=record)  # type: ignore[arg-type]
    assert engine.runner.graphs is not None
    engine.runner.graphs.worth = 1
    return engine


@pytest.fixture(params=["kernels", "torch"])
def bodies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both bodies of attention over rows that there are here."""
    if request.param == "torch":
        monkeypatch.setattr(native, "attends", lambda keys: False)
    elif not native.built():
        pytest.skip("the kernels are not built")


@pytest.mark.usefixtures("bodies")
@pytest.mark.parametrize("pages", [400, 24])
def test_mixed_requests_of_all_rows(
    pages: int, modules: dict[str, Loaded], tokenizer: Tokenizer, exactness: Exactness
) -> None:
    want = serve(make_engine(modules, tokenizer), mixed_jobs())
    engine = recording(modules, tokenizer, pages=pages)
    exactness.same_served(serve(engine, mixed_jobs()), want)
    graphs = engine.runner.graphs
    assert graphs is not None and graphs.replays > 20 and len(graphs) > 1
    assert engine.table.available() == pages


def test_every_row_by_itself(modules: dict[str, Loaded], tokenizer: Tokenizer, exactness: Exactness) -> None:
    for name, row in ROWS.items():
        jobs = [
            Job(row, (5, 6, 7, 8, 9)[: 1 + n], Sampling(max_tokens=9, ignore_eos=True, logprobs=2))
            for n in range(5)
        ]
        want = serve(make_engine(modules, tokenizer), jobs)
        engine = recording(modules, tokenizer)
        exactness.same_served(serve(engine, jobs), want)
        assert engine.runner.graphs is not None and engine.runner.graphs.replays, name


def test_no_page_of_anybody_is_touched_by_padding(modules: dict[str, Loaded], tokenizer: Tokenizer) -> None:
    engine = recording(modules, tokenizer, pages=40)
    pool = engine.runner.pool
    assert pool.keys.shape[1] == 41
    chance = random.Random(3)
    written: set[int] = set()
    fill, graphs = running.Graphs.run, engine.runner.graphs
    assert graphs is not None

    def watched(self: object, model: object, each: object) -> object:
        before = pool.keys.clone()
        found = fill(self, model, each)  # type: ignore[arg-type]
        changed = (pool.keys != before).any(-1).any(-1).any(0).flatten().nonzero().flatten().tolist()
        allowed = set(each.write_slots) | set(range(40 * PAGE, 41 * PAGE))  # type: ignore[attr-defined]
        assert set(changed) <= allowed
        written.update(changed)
        return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(running.Graphs, "run", watched)
        jobs = [
            Job(row, tuple(chance.randrange(3, 250) for _ in range(6))) for row in list(ROWS.values())[:5]
        ]
        serve(engine, jobs)
    assert 40 * PAGE in written and len(written) > 5


def test_what_is_not_finite_in_the_scratch_page_reaches_nobody(
    modules: dict[str, Loaded], tokenizer: Tokenizer, exactness: Exactness
) -> None:
    want = serve(make_engine(modules, tokenizer), mixed_jobs(9))
    engine = recording(modules, tokenizer)
    engine.runner.pool.keys[:, -1] = torch.nan
    engine.runner.pool.values[:, -1] = torch.nan
    exactness.same_served(serve(engine, mixed_jobs(9)), want)


def test_modules_that_come_and_go_are_not_replayed(
    modules: dict[str, Loaded], tokenizer: Tokenizer, tiny_model: object, exactness: Exactness
) -> None:
    mine = toy_modules(tiny_model)  # type: ignore[arg-type]
    engine = recording(mine, tokenizer)
    serve(engine, mixed_jobs(16))
    graphs = engine.runner.graphs
    assert graphs is not None and len(graphs) > 0
    gone = weakref.ref(mine["a"].model)
    engine.unload(["a"])
    assert len(graphs) == 0
    del mine["a"]
    assert gone() is None, "nothing recorded holds weights that were unloaded"
    engine.load({"a": modules["b"].__class__("a", "digest of b", "a", modules["b"].model)})
    rows = {name: row for name, row in ROWS.items() if name == "independent-a"}
    jobs = [Job(row, (5, 6, 7, 8)) for row in rows.values()]
    want = serve(make_engine({"a": modules["b"]}, tokenizer), jobs)
    exactness.same_served(serve(engine, jobs), want)


def test_a_shape_is_recorded_when_it_comes_again_and_the_oldest_go(
    modules: dict[str, Loaded], tokenizer: Tokenizer
) -> None:
    recorded = 0

    def counting(run: Run) -> Run:
        nonlocal recorded
        recorded += 1
        return run

    engine = recording(modules, tokenizer, record=counting)
    graphs = engine.runner.graphs
    assert graphs is not None
    graphs.worth = 2
    job = Job(ROWS["independent-a"], (5, 6, 7, 8, 9), Sampling(max_tokens=3, ignore_eos=True, logprobs=2))
    serve(engine, [job])
    first = recorded
    serve(engine, [Job(job.row, (9, 8, 7, 6, 5), job.sampling)])
    assert recorded > first or first > 0
    before = recorded
    serve(engine, [Job(job.row, (4, 8, 7, 6, 5), job.sampling)])
    assert recorded == before and graphs.replays > 0, "replayed, not recorded again"
    assert len(graphs) <= MOST_LAYOUTS


def test_what_cannot_be_recorded_runs_as_it_is_and_says_so_once(
    modules: dict[str, Loaded], tokenizer: Tokenizer, exactness: Exactness
) -> None:
    def failing(run: Run) -> Run:
        raise RuntimeError("out of memory\nwith a long story")

    want = serve(make_engine(modules, tokenizer), mixed_jobs(12))
    engine = recording(modules, tokenizer, record=failing)
    with pytest.warns(UserWarning, match="without graphs: out of memory$") as said:
        exactness.same_served(serve(engine, mixed_jobs(12)), want)
    assert len(said) == 1


def test_rows_of_entries_are_those_of_groups(modules: dict[str, Loaded], tokenizer: Tokenizer) -> None:
    """What the Triton kernel is given where passes are not recorded."""
    engine = make_engine(modules, tokenizer)
    asked: list[tuple[torch.Tensor, torch.Tensor]] = []
    plain = engine.runner._ask

    def both(entries: list) -> object:
        rows, ask = engine.runner._row_pages(entries), plain(entries)

        def compared(
            q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, sinks: torch.Tensor | None = None
        ) -> torch.Tensor:
            found = ask(q, keys, values, sinks=sinks)
            asked.append((found, decoding.torch_rows(q, keys, values, rows, sinks)))
            return found

        return compared

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(native, "attends", lambda keys: False)
        patched.setattr(engine.runner, "_ask", both)
        serve(engine, mixed_jobs(12))
    assert len(asked) > 10
    for found, rows in asked:
        torch.testing.assert_close(rows, found, rtol=0, atol=1e-5)
