"""Serving promises: every row speaks as its table says, however requests are batched, cached or preempted."""

import copy
import random
from collections.abc import Sequence

import pytest
import torch

from heliostat.build import Loaded
from heliostat.engine.request import Sampling
from heliostat.family import SHARINGS, Row
from heliostat.linear.lora import add_adapter
from heliostat.model.tokenizer import Tokenizer
from heliostat.model.transformer import Transformer
from tests.promises.toys import (
    PAGE,
    ROWS,
    TARGETS,
    Exactness,
    Job,
    Plain,
    adapt,
    make_engine,
    reference,
    serve,
    served_logits,
    toy_modules,
)

LENGTHS = (1, 2, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 2 * PAGE + 1, 3 * PAGE - 1)


def text(length: int, *, seed: int = 0) -> tuple[int, ...]:
    """Token ids by chance."""
    chance = random.Random(f"{seed}/{length}")
    return tuple(chance.randrange(3, 250) for _ in range(length))


def answer(length: int) -> Sampling:
    return Sampling(max_tokens=length, ignore_eos=True, logprobs=2)


def mixed_jobs(count: int = 36) -> list[Job]:
    """Requests of all rows, of many lengths, some with a beginning in common."""
    chance = random.Random(5)
    shared = text(9, seed=7)
    return [
        Job(
            row,
            shared[: chance.randrange(10)] + text(chance.randrange(1, 9), seed=i),
            answer(chance.randrange(1, 9)),
        )
        for i, row in zip(range(count), list(ROWS.values()) * 3, strict=False)
    ]


@pytest.fixture(scope="module")
def one_by_one(modules: dict[str, Loaded], tokenizer: Tokenizer) -> list:
    """The answers to ``mixed_jobs``, each by an engine that has seen nothing else."""
    return [serve(make_engine(modules, tokenizer, pages=16), [job])[0] for job in mixed_jobs()]


# 1. All modules are the base: every row gives the base's logits.


@pytest.mark.parametrize("row", [*SHARINGS, "three", "three-first"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_where_all_modules_are_the_base_every_row_speaks_as_the_base(
    row: str, kind: str, tiny_model: Transformer, tokenizer: Tokenizer
) -> None:
    names = ("own", "base", "third")
    if kind == "full":
        same = {name: Loaded(name, name, name, copy.deepcopy(tiny_model)) for name in names}
    else:
        model = copy.deepcopy(tiny_model)
        for name in names:
            add_adapter(model, name, r=2, alpha=4, targets=TARGETS)  # a fresh adapter adds nothing
        same = {name: Loaded(name, name, "base", model, name) for name in names}
    rows = {"three": Row("own", "base", "third", "third"), "three-first": Row("own", "base", "third", "own")}
    rows |= {name: sharing.row for name, sharing in SHARINGS.items()}
    prompt, said = text(6), text(7, seed=1)
    base = Plain(Loaded("base", "", "base", tiny_model))
    nothing = torch.empty(0, base.config.kv_heads, base.config.head_width)
    logits, _ = base.run([*prompt, *said], 0, [(nothing, nothing)] * base.config.layers)
    got = served_logits(make_engine(same, tokenizer), rows[row], prompt, said)
    torch.testing.assert_close(got, logits[len(prompt) - 1 : -1], rtol=0, atol=1e-4)


# 2. Paged is plain.


@pytest.mark.parametrize("name", ROWS)
def test_paged_answers_are_those_of_whole_sequences(
    name: str, modules: dict[str, Loaded], tokenizer: Tokenizer, exactness: Exactness
) -> None:
    for length in LENGTHS:
        job = Job(ROWS[name], text(length), answer(PAGE + 2))
        exactness.same_as_reference(
            serve(make_engine(modules, tokenizer), [job])[0], job.row, modules, job.prompt
        )


@pytest.mark.parametrize("name", ROWS)
def test_paged_logits_are_those_of_whole_sequences(
    name: str, modules: dict[str, Loaded], tokenizer: Tokenizer
) -> None:
    for length in (1, PAGE, PAGE + 1):
        prompt, said = text(length), text(2 * PAGE, seed=3)
        got = served_logits(make_engine(modules, tokenizer), ROWS[name], prompt, said)
        want = reference(ROWS[name], modules, [*prompt, *said], length)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_the_toys_differ_so_that_a_wrong_module_would_be_seen(modules: dict[str, Loaded]) -> None:
    ids = [*text(6), *text(6, seed=1)]
    logits = {name: reference(row, modules, ids, 6) for name, row in ROWS.items()}
    for one in ROWS:
        for other in ROWS:
            if one < other:
                assert (logits[one] - logits[other]).abs().max() > 0.1, (one, other)


def test_a_prefill_in_small_chunks_is_a_prefill(
    modules: dict[str, Loaded], tokenizer: Tokenizer, one_by_one: list, exactness: Exactness
) -> None:
    engine = make_engine(modules, tokenizer, max_tokens_per_step=5, max_running=5)
    exactness.same_served(serve(engine, mixed_jobs()), one_by_one)


# 3. A batch mixed over members and rows is one by one.


def test_a_batch_of_all_rows_is_one_by_one(
    modules: dict[str, Loaded], tokenizer: Tokenizer, one_by_one: list, exactness: Exactness
) -> None:
    exactness.same_served(serve(make_engine(modules, tokenizer), mixed_jobs()), one_by_one)


def test_order_and_company_change_no_answer(
    modules: dict[str, Loaded], tokenizer: Tokenizer, one_by_one: list, exactness: Exactness
) -> None:
    jobs = list(enumerate(mixed_jobs()))
    random.Random(1).shuffle(jobs)
    got = serve(make_engine(modules, tokenizer, max_running=7), [job for _, job in jobs])
    exactness.same_served(got, [one_by_one[i] for i, _ in jobs])


# 4. Cached is uncached, and a hit is where the row says.


def test_a_cached_answer_is_the_uncached(
    modules: dict[str, Loaded], tokenizer: Tokenizer, one_by_one: list, exactness: Exactness
) -> None:
    engine = make_engine(modules, tokenizer, pages=1000)
    first, again = serve(engine, mixed_jobs()), serve(engine, mixed_jobs())
    exactness.same_served(again, first)
    exactness.same_served(again, one_by_one)
    assert sum(s.cached for s in again) > sum(s.cached for s in first) > 0


def pages_in_common(job: Job, history: Sequence[tuple[Job, Sequence[int]]]) -> int:
    """Tokens a request may take from the cache: whole pages whose writers and tokens were written before."""

    def written(row: Row, prompt: Sequence[int], count: int) -> list[str]:
        return [row.writer_at(place, len(prompt)) for place in range(count)]

    best, full = 0, (len(job.prompt) - 1) // PAGE * PAGE
    mine = list(zip(job.prompt, written(job.row, job.prompt, len(job.prompt)), strict=True))
    for other, said in history:
        tokens = [*other.prompt, *said][:-1]  # the last token is never read again
        theirs = list(zip(tokens, written(other.row, other.prompt, len(tokens)), strict=True))
        common = 0
        while (
            common + PAGE <= min(full, len(theirs))
            and mine[common : common + PAGE] == theirs[common : common + PAGE]
            and len({writer for _, writer in mine[common : common + PAGE]}) == 1
        ):
            common += PAGE
        best = max(best, common)
    return best


def turns() -> list[tuple[str, str, str]]:
    """(row of the first turn, row of the second, whether the second repeats the answer)."""
    names = ["independent-a", "sun-a", "prefillshare-a", "icarus-a", "prefillshare-la", "icarus-la", "sun-la"]
    return [(one, two, how) for one in names for two in names for how in ("same prompt", "next turn")]


@pytest.mark.parametrize(("first", "second", "how"), turns())
def test_a_hit_is_exactly_where_writers_and_tokens_agree(
    first: str, second: str, how: str, modules: dict[str, Loaded], tokenizer: Tokenizer
) -> None:
    engine = make_engine(modules, tokenizer)
    before = Job(ROWS[first], text(2 * PAGE + 1), answer(2 * PAGE))
    said = serve(engine, [before])[0].ids
    prompt = before.prompt + (said + text(3, seed=9) if how == "next turn" else ())
    job = Job(ROWS[second], prompt, answer(2))
    assert serve(engine, [job])[0].cached == pages_in_common(job, [(before, said)])


def test_where_the_hits_are_by_name(modules: dict[str, Loaded], tokenizer: Tokenizer) -> None:
    """The table in words: tokens that the second of two requests finds, over prompt and answer of the first."""
    prompt, room = text(3 * PAGE), answer(2 * PAGE + 1)

    def found(one: str, two: str, *, turn: bool) -> int:
        engine = make_engine(modules, tokenizer)
        said = serve(engine, [Job(ROWS[one], prompt, room)])[0].ids
        return serve(engine, [Job(ROWS[two], (*prompt, *(said if turn else ()), 5))])[0].cached

    assert found("icarus-a", "icarus-la", turn=True) == 5 * PAGE  # prompt and answer, over members
    assert found("prefillshare-a", "prefillshare-la", turn=False) == 2 * PAGE  # prompts over members; the
    # page of the last prompt token has two writers
    assert found("prefillshare-a", "prefillshare-a", turn=True) == 2 * PAGE  # answers never
    assert found("sun-a", "sun-a", turn=True) == 3 * PAGE  # prompts inside a member, answers never
    assert found("sun-a", "sun-la", turn=False) == 0
    assert found("independent-a", "independent-a", turn=True) == 5 * PAGE
    assert found("independent-a", "independent-la", turn=False) == 0
    assert found("independent-a", "icarus-a", turn=False) == 0


def test_another_tenant_finds_nothing(modules: dict[str, Loaded], tokenizer: Tokenizer) -> None:
    engine = make_engine(modules, tokenizer)
    row, prompt = ROWS["icarus-a"], text(3 * PAGE)
    serve(engine, [Job(row, prompt, salt="one")])
    assert [s.cached for s in serve(engine, [Job(row, prompt, salt="two"), Job(row, prompt)])] == [0, 0]
    assert serve(engine, [Job(row, prompt, salt="one")])[0].cached == 2 * PAGE


def test_a_module_loaded_again_under_its_name_with_other_weights_finds_no_stale_page(
    tiny_model: Transformer, tokenizer: Tokenizer, exactness: Exactness
) -> None:
    modules = toy_modules(tiny_model)
    engine, rows = make_engine(modules, tokenizer), ("independent-a", "sun-a", "sun-la", "icarus-la")
    jobs = [Job(ROWS[name], text(3 * PAGE, seed=number)) for number, name in enumerate(rows)]
    old = [serve(engine, [job])[0] for job in jobs]
    assert [serve(engine, [job])[0].cached for job in jobs] == [2 * PAGE] * 4
    engine.unload(["a", "b", "la"])
    base = modules["base"].model
    adapt(base, "la", 99)
    new = {
        "a": Loaded("a", "digest of b", "a", modules["b"].model),
        "la": Loaded("la", "of 99", "base", base, "la"),
    }
    engine.load(new)
    for job, before in zip(jobs, old, strict=True):
        (got,) = serve(engine, [job])
        exactness.same_as_reference(got, job.row, modules | new, job.prompt)
        # What the base wrote for the adapter's member is still good.
        assert got.cached == (2 * PAGE if job.row.prompt_writer == "base" else 0) and got.ids != before.ids


# 5. Preempted is not preempted.


def test_a_preempted_answer_is_the_undisturbed(
    modules: dict[str, Loaded], tokenizer: Tokenizer, one_by_one: list, exactness: Exactness
) -> None:
    got = serve(make_engine(modules, tokenizer, pages=9), mixed_jobs())
    assert sum(s.preemptions > 0 for s in got) >= 5
    exactness.same_served(got, one_by_one)


def test_a_sampled_answer_survives_preemption(modules: dict[str, Loaded], tokenizer: Tokenizer) -> None:
    warm = Sampling(max_tokens=20, temperature=1.0, seed=3, ignore_eos=True)
    jobs = [Job(row, text(5, seed=i), warm) for i, row in enumerate(ROWS.values())]
    alone = [serve(make_engine(modules, tokenizer), [job])[0].ids for job in jobs]
    got = serve(make_engine(modules, tokenizer, pages=10), jobs)
    assert any(s.preemptions for s in got)
    assert [s.ids for s in got] == alone


# 10. No token runs through a module that its row does not ask for.


def expected_rows(row: Row, prompt: int, said: int) -> dict[str, int]:
    """Rows of passes that each module should see for one request."""
    boundary, total = row.boundary(prompt), prompt + said - 1
    counts = {row.prompt_writer: boundary}
    counts[row.answer_writer] = counts.get(row.answer_writer, 0) + total - boundary
    if row.speaker != row.answer_writer:
        counts[row.speaker] = counts.get(row.speaker, 0) + total - max(boundary, prompt - 1)
    return {name: count for name, count in counts.items() if count}


@pytest.mark.parametrize("name", ROWS)
def test_serving_runs_no_token_through_a_module_that_the_row_does_not_ask_for(
    name: str, modules: dict[str, Loaded], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, seen = make_engine(modules, tokenizer), dict.fromkeys(modules, 0)
    forward = engine.runner._forward

    def counting(each):
        for segment in each.segments:
            seen[segment.adapter or each.weights] += segment.stop - segment.start
        return forward(each)

    monkeypatch.setattr(engine.runner, "_forward", counting)
    serve(engine, [Job(ROWS[name], text(6), answer(5))])
    assert {name: count for name, count in seen.items() if count} == expected_rows(ROWS[name], 6, 5)


# 12. Seeds.


def test_what_is_sampled_depends_on_the_request_alone(
    modules: dict[str, Loaded], tokenizer: Tokenizer
) -> None:
    def warm(seed: int, choice: int = 0) -> Sampling:
        return Sampling(max_tokens=6, temperature=0.9, top_p=0.95, seed=seed, choice=choice, ignore_eos=True)

    jobs = [Job(row, text(5), warm(seed)) for row in ROWS.values() for seed in (1, 2)]
    jobs += [Job(ROWS["sun-a"], text(5), warm(1, choice)) for choice in range(4)]
    together = [s.ids for s in serve(make_engine(modules, tokenizer), jobs)]
    assert together == [serve(make_engine(modules, tokenizer), [job])[0].ids for job in jobs]
    assert together == [s.ids for s in serve(make_engine(modules, tokenizer), jobs[::-1])][::-1]
    assert len(set(together[-4:])) == 4  # every choice has noise of its own
    assert together[0] != together[1]


# 13. Other number formats.


@pytest.mark.parametrize("name", ["independent-a", "sun-a", "prefillshare-la", "icarus-a", "three-mixed"])
def test_modules_of_two_formats_share_a_float32_pool(
    name: str, tiny_model: Transformer, tokenizer: Tokenizer
) -> None:
    """A frozen half in bfloat16 under an own half in float32, as training has them."""
    wide, narrow = toy_modules(tiny_model), toy_modules(tiny_model, dtype=torch.bfloat16)
    both = {**narrow, **{n: wide[n] for n in ("a", "b", "c")}}
    engine = make_engine(both, tokenizer)
    assert engine.runner.pool.keys.dtype is torch.float32
    prompt, said = text(6), text(6, seed=1)
    got = served_logits(engine, ROWS[name], prompt, said)
    rounded = {
        n: Loaded(m.name, m.digest, m.weights, copy.deepcopy(m.model).float(), m.adapter)
        for n, m in both.items()
    }
    want = reference(ROWS[name], rounded, [*prompt, *said], 6)
    assert (got.log_softmax(-1) - want.log_softmax(-1)).abs().max() < 0.25
