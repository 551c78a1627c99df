"""Drafted tokens over HTTP: what is served is what --draft and --verify say, and every answer tells what came of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from heliostat.build import read_family
from heliostat.engine.speculation.wanted import Wanted
from heliostat.errors import Refused
from heliostat.model.judge import Judge, judge_name, write_judge
from heliostat.serve.run import Settings, service_of
from tests.unit.serve.conftest import Serving, engine_of, run
from tests.unit.serve.test_metrics import scraped, value

DRAFT = Wanted(draft="base", adaptive=False, ahead=3)
LOSSY = Wanted(draft="base", verify=("topk:2", "entropy:0.5:1"), adaptive=False, ahead=3)


def told(reply: dict[str, Any]) -> dict[str, Any]:
    """What the usage says of it."""
    found: dict[str, Any] = reply["usage"]["speculation"]
    return found


@pytest.mark.parametrize("member", ["base", "math", "code", "plan"])
def test_answers_are_the_same_and_say_what_was_drafted(serving: Serving, member: str) -> None:
    async def work() -> None:
        async with serving(wanted=DRAFT) as served:
            plain = await served.chat(model=member, max_tokens=14, speculation="off")
            assert "speculation" not in plain["usage"]
            drafted = await served.chat(model=member, max_tokens=14)
            assert drafted["choices"] == plain["choices"]
            counts = told(drafted)
            assert counts["rule"] == "lossless" and counts["judged"] == 0
            assert 0 <= counts["accepted"] <= counts["drafted"] and counts["drafted"] > 0
            if member == "base":  # who drafts is who speaks
                assert counts["accepted"] == counts["drafted"]
            assert await served.held() == 0

    run(work())


def test_it_is_off_where_nobody_said_draft(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            assert engine_of(served.service).speculator is None
            assert "speculation" not in (await served.chat())["usage"]
            assert "speculation" not in (await served.chat(speculation="off"))["usage"]
            error = (await served.chat(status=400, speculation="lossless"))["error"]
            assert error["param"] == "speculation" and "--draft" in error["message"]

    run(work())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_streams_and_choices_add_up(serving: Serving, path: str) -> None:
    async def work() -> None:
        async with serving(wanted=DRAFT) as served:
            asked: dict[str, Any] = {"n": 2, "temperature": 0.8, "seed": 4, "max_tokens": 12}
            asked |= {} if "chat" in path else {"prompt": "add 2 and 3"}
            events = await served.stream(path, stream_options={"include_usage": True}, **asked)
            usage = events[-2]
            whole = await served.stream(
                path, speculation="off", stream_options={"include_usage": True}, **asked
            )
            assert told(usage)["drafted"] > 0 and "speculation" not in whole[-2]["usage"]
            for number in (0, 1):
                texts = [
                    "".join(
                        choice.get("text") or choice.get("delta", {}).get("content") or ""
                        for event in found[:-2]
                        for choice in event["choices"]
                        if choice["index"] == number
                    )
                    for found in (events, whole)
                ]
                assert texts[0] == texts[1] != ""

    run(work())


def test_the_other_dialect_tells_it_too(serving: Serving) -> None:
    async def work() -> None:
        async with serving(wanted=DRAFT) as served:
            asked: dict[str, Any] = {
                "model": "base",
                "input": "add 2 and 3",
                "temperature": 0,
                "max_output_tokens": 12,
            }
            plain = await served.post("/v1/responses", speculation="off", **asked)
            drafted = await served.post("/v1/responses", **asked)
            assert drafted["output"][0]["content"] == plain["output"][0]["content"]
            assert told(drafted)["drafted"] > 0 and "speculation" not in plain["usage"]

    run(work())


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("judged", "speculation 'judged' is not allowed here"),
        ("topk:3", "allowed is: lossless, off"),
        ("anything", "no rule 'anything' for drafted tokens"),
        ("kl:lots", "needs a number"),
    ],
)
def test_rules_that_who_serves_does_not_allow_are_refused_by_name(
    serving: Serving, rule: str, message: str
) -> None:
    async def work() -> None:
        async with serving(wanted=DRAFT) as served:
            error = (await served.chat(status=400, speculation=rule))["error"]
            assert error["param"] == "speculation" and message in error["message"]
            assert told(await served.chat(speculation="lossless"))["rule"] == "lossless"

    run(work())


def test_rules_that_are_allowed_are_served_the_first_where_nobody_says(serving: Serving) -> None:
    async def work() -> None:
        async with serving(wanted=LOSSY) as served:
            assert told(await served.chat())["rule"] == "topk:2"
            assert told(await served.chat(speculation="entropy:0.5:1"))["rule"] == "entropy:0.5:1"
            assert told(await served.chat(speculation="lossless"))["rule"] == "lossless"
            assert "allowed is: lossless, topk:2, entropy:0.5:1, off" in json.dumps(
                await served.chat(status=400, speculation="topk:9")
            )

    run(work())


def test_metrics_and_the_page_count_by_member_and_rule(serving: Serving) -> None:
    async def work() -> None:
        async with serving(wanted=LOSSY) as served:
            first = told(await served.chat(model="math", max_tokens=14))
            second = told(await served.chat(model="math", max_tokens=14, temperature=1.0, seed=3))
            await served.chat(model="math", speculation="off")
            now = await scraped(served)
            for what in ("drafted", "accepted", "judged"):
                assert (
                    value(now, f"heliostat_{what}_tokens_total", member="math", rule="topk:2")
                    == first[what] + second[what]
                )
            page = (await served.client.get("/")).text
            assert "Drafted by base" in page and "<td>topk:2</td>" in page

    run(work())


def test_a_judge_scores_and_thresholds_are_named(serving: Serving, tiny_family: Path) -> None:
    import torch

    family = read_family(tiny_family)
    width = 32
    judge = Judge(
        torch.zeros(width),
        0.0,  # half of a doubt about everything
        speaker=family.module("base").digest,
        draft=family.module("solo.own").digest,
        theta=0.75,
        thetas={"recall": 0.25, "f1": 0.75},
        speaker_module="base",
        draft_module="solo.own",
    )
    write_judge(tiny_family, judge_name("base", "solo.own"), judge)
    wanted = Wanted(
        draft="solo.own", verify=("judged", "judged:recall", "judged:inf", "judged:other"), adaptive=False
    )

    async def work() -> None:
        async with serving(family=tiny_family, wanted=wanted) as served:
            asked: dict[str, Any] = {"temperature": 1.5, "seed": 2, "max_tokens": 30}
            plain = await served.chat(speculation="off", **asked)
            for strict in ("judged", "judged:inf"):
                reply = await served.chat(speculation=strict, **asked)
                assert reply["choices"] == plain["choices"] and told(reply)["judged"] == 0
            kind = told(await served.chat(speculation="judged:recall", **asked))
            assert kind["judged"] > 0 and kind["accepted"] == kind["drafted"]
            error = (await served.chat(status=400, speculation="judged:other"))["error"]
            assert "no threshold 'other'; there is: f1, recall" in error["message"]
            # code and plan have other speakers: of them this judge says nothing.
            error = (await served.chat(status=400, model="plan", speculation="judged"))["error"]
            assert "needs a judge, and none is loaded for the speaker 'plan.own" in error["message"]

    run(work())


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"draft": "smal"}, "no module 'smal'"),
        ({"draft": "base", "verify": ("exact",)}, "no rule 'exact'"),
        ({"verify": ("lossless",)}, "nothing is drafted: say --draft"),
        ({"draft": "ngram", "verify": ("kl:0.1",)}, "the draft 'ngram' has none"),
        ({"draft": "base", "judge": "mine"}, "would judge nothing"),
        ({"draft": "base", "verify": ("judged",)}, "has no judge"),
        ({"draft": "ngram", "ahead": 99}, "99 drafted tokens"),
    ],
)
def test_a_server_that_cannot_be_so_does_not_start(
    wanted: dict[str, Any], message: str, tiny_family_made: Path
) -> None:
    with pytest.raises(Refused, match=message):
        service_of(Settings(family=tiny_family_made, dtype="float32", cache_mib=16, wanted=Wanted(**wanted)))
