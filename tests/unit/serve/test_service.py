"""Members come, go and change while the server runs; requests in flight end on what they began with."""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from heliostat.export import remove_member
from heliostat.llm import LLM
from heliostat.model.tokenizer import Tokenizer
from heliostat.serve.crew import Alone
from tests.unit.serve.conftest import Pace, Served, Serving, engine_of, run, until

Tune = Callable[..., Any]


def again(folder: Path, member: str, sharing: str, data: Path, tune: Tune, **options: Any) -> None:
    """Tune a member of the family anew, under its own name."""
    remove_member(folder, member)
    tune(folder, member, sharing, data, max_steps=6, **options)


def offline(folder: Path, member: str) -> str:
    llm = LLM(folder, members=[member], dtype="float32", cache_mib=16)
    return llm.generate("add 2 and 3", member=member, max_tokens=8, ignore_eos=True)[0].text


def said(reply: Any) -> str:
    return str(reply["choices"][0]["message"]["content"])


def loaded(served: Served) -> set[str]:
    return set(engine_of(served.service).digests)


def held(served: Served) -> set[str]:
    """What the worker's shelf has in memory."""
    assert isinstance(served.service.crew, Alone)
    shelf = served.service.crew.worker.shelf
    assert shelf is not None
    return set(shelf.held)


def test_a_member_is_loaded_and_unloaded(serving: Serving, tiny_family: Path) -> None:
    async def work() -> None:
        async with serving(family=tiny_family, members=["base", "math"]) as served:
            before = loaded(served)
            await served.chat(model="plan", status=404)
            for member in ("plan", "code"):
                found = await served.post(f"/admin/members/{member}/load")
                assert found["version"] == f"{member}@v1" and found["share"] == 1
                assert said(await served.chat(model=member)) == offline(tiny_family, member)
            assert len(loaded(served)) == len(before) + 2
            assert len((await served.get("/v1/models"))["data"]) == 4
            await served.post("/admin/members/plan/load", 400)
            for member in ("plan", "code"):
                await served.post(f"/admin/members/{member}/unload")
                await served.chat(model=member, status=404)
            assert loaded(served) == before and held(served) == before
            await served.post("/admin/members/plan/load")
            assert said(await served.chat(model="plan")) == offline(tiny_family, "plan")

    run(work())


@pytest.mark.parametrize(
    ("member", "sharing", "tuner"), [("math", "sun", "full"), ("plan", "icarus", "lora")]
)
def test_a_member_rolls_while_a_request_ends_on_the_old_one(
    serving: Serving,
    tiny_family: Path,
    tiny_data: Path,
    tune_member: Tune,
    member: str,
    sharing: str,
    tuner: str,
) -> None:
    old = offline(tiny_family, member)

    async def work() -> None:
        async with serving(family=tiny_family) as served:
            before = loaded(served)
            again(tiny_family, member, sharing, tiny_data, tune_member, tuner=tuner)
            new = await asyncio.to_thread(offline, tiny_family, member)
            assert new != old
            pace = Pace(engine_of(served.service), steps=3)
            flying = asyncio.create_task(served.chat(model=member))
            await until(lambda: served.service.in_flight == 1)
            await pace.spent()
            found = await served.post(f"/admin/members/{member}/roll")
            assert found["version"] == f"{member}@v2" and found["in_flight"] == 0
            assert len(loaded(served)) == len(before) + 1
            later = asyncio.create_task(served.chat(model=member))
            await until(lambda: served.service.in_flight == 2)
            pace.left = 10**6
            replies = await flying, await later
            assert [said(reply) for reply in replies] == [old, new]
            assert replies[0]["system_fingerprint"].startswith(f"{member}@v1-")
            assert replies[1]["system_fingerprint"].startswith(f"{member}@v2-")
            await until(lambda: len(loaded(served)) == len(before))
            assert loaded(served) != before
            await served.chat(model=f"{member}@v1", status=404)

    run(work())


async def held_on_one_version(served: Served, reply: Any, either: set[str]) -> None:
    """A conversation goes on with who answered it, and a user with who answered first."""
    turns = [{"role": "user", "content": "add 2 and 3"}, reply["choices"][0]["message"]]
    turns.append({"role": "user", "content": "add 2 and 3"})
    replies = [await served.chat(model="math", messages=turns) for _ in range(5)]
    assert {each["system_fingerprint"] for each in replies} == {reply["system_fingerprint"]}
    for user in ("alice", "bob"):
        replies = [await served.chat(model="math", user=user) for _ in range(5)]
        assert len({each["system_fingerprint"] for each in replies}) == 1
        assert said(replies[0]) in either


def test_a_canary_gets_its_share_and_then_all(
    serving: Serving, tiny_family: Path, tiny_data: Path, tune_member: Tune
) -> None:
    tune_member(tiny_family, "math-next", "sun", tiny_data, max_steps=6)
    old, new = offline(tiny_family, "math"), offline(tiny_family, "math-next")
    assert old != new

    async def work() -> None:
        async with serving(family=tiny_family, members=["base", "math"]) as served:
            before = loaded(served)
            path = "/admin/members/math"
            body: dict[str, Any] = {"share": 0.25, "source": "math-next"}
            found = (await served.post(f"{path}/canary", **body))["members"]
            assert [(m["version"], m["share"]) for m in found] == [("math@v1", 0.75), ("math@v2", 0.25)]
            replies = await asyncio.gather(*(served.chat(model="math") for _ in range(20)))
            assert Counter(map(said, replies)) == {old: 15, new: 5}
            await held_on_one_version(served, replies[0], {old, new})
            assert said(await served.chat(model="math@v2")) == new
            assert {c["id"] for c in (await served.get("/v1/models"))["data"]} == {
                "base",
                "math",
                "math@v1",
                "math@v2",
            }
            await served.post(f"{path}/canary", share=0)
            assert loaded(served) == before
            await served.post(f"{path}/canary", 400, **{**body, "share": 2})
            assert loaded(served) == before, "what was loaded in vain went again"
            await served.chat(model="math@v2", status=404)
            await served.post(f"{path}/canary", **body)
            await served.post(f"{path}/roll", source="math-next")
            assert said(await served.chat(model="math")) == new
            (standing,) = (await served.get("/admin/members"))["members"]["math"]
            assert standing["version"] == "math@v3" and standing["source"] == "math-next"

    run(work())


def test_what_cannot_be_changed_is_told_and_changes_nothing(serving: Serving, tiny_family: Path) -> None:
    async def work() -> None:
        async with serving(family=tiny_family, members=["base", "math"]) as served:
            before = loaded(served), await served.get("/admin/members")
            await served.post("/admin/members/nobody/roll", 404)
            await served.post("/admin/members/nobody/unload", 404)
            await served.post("/admin/members/nobody/canary", 404, share=0.1)
            await served.post("/admin/members/math/canary", 422)
            await served.post("/admin/members/math/canary", 400, share=2)
            await served.post("/admin/members/math/canary", 400, share=0.1)
            await served.post("/admin/members/nobody/load", 400)
            weights = next((tiny_family / "modules").glob("code*/*.safetensors"))
            weights.write_bytes(weights.read_bytes()[:-4] + b"\0\1\2\3")
            error = (await served.post("/admin/members/code/load", 400))["error"]
            assert str(tiny_family) not in error["message"] and "code" in error["message"]
            assert (loaded(served), await served.get("/admin/members")) == before

    run(work())


def test_the_same_version_again_is_no_new_one(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            before = loaded(served)
            assert (await served.post("/admin/members/math/roll"))["version"] == "math@v1"
            assert loaded(served) == before

    run(work())


def test_what_does_not_fit_beside_the_others_is_not_loaded(
    serving: Serving, tiny_family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with serving(family=tiny_family, members=["base", "math"]) as served:
            before = loaded(served)
            monkeypatch.setattr("heliostat.serve.shelf.available_memory", lambda device: 20_000)
            error = (await served.post("/admin/members/code/load", 400))["error"]["message"]
            assert "weights of code.own" in error and "weights of base" not in error, "the base is there"
            assert "Unload a member" in error and str(tiny_family) not in error
            assert loaded(served) == before
            await served.post("/admin/members/plan/load")  # a small adapter still fits
            await served.chat(model="plan")

    run(work())


def test_conversations_are_written_side_by_side(
    serving: Serving, tiny_family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(2, timeout=20)
    render = Tokenizer.render

    def both(self: Tokenizer, *args: Any, **options: Any) -> str:
        together.wait()  # breaks where only one may render at a time
        return render(self, *args, **options)

    async def work() -> None:
        async with serving(family=tiny_family, members=["base"]) as served:
            monkeypatch.setattr(Tokenizer, "render", both)
            replies = await asyncio.gather(*(served.chat(f"add {n}") for n in range(2)))
            assert all(reply["choices"] for reply in replies)

    run(work())
