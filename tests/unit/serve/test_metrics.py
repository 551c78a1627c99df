"""What Prometheus reads, and that the dashboard asks for nothing else."""

import asyncio
import json
import re
from importlib.resources import files
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from heliostat.serve.metrics import ALIASES
from tests.unit.serve.conftest import Pace, Served, Serving, engine_of, run, until

LONG = "one two three four five six seven " * 3
Values = dict[tuple[str, frozenset[tuple[str, str]]], float]


async def scraped(served: Served) -> Values:
    reply = await served.client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(reply.text)
    return {(s.name, frozenset(s.labels.items())): s.value for f in families for s in f.samples}


def value(values: Values, name: str, **labels: str) -> float:
    return values[name, frozenset(labels.items())]


def test_what_is_counted(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            for member in ("code", "plan"):
                usage = (await served.chat(LONG, model=member))["usage"]
            now = await scraped(served)
            assert value(now, "heliostat_generation_tokens_total", member="plan") == 8
            assert value(now, "heliostat_prompt_tokens_total", member="plan") == usage["prompt_tokens"]
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            assert value(now, "heliostat_prefix_cache_hits_total", member="plan") == cached > 0
            assert (
                value(now, "heliostat_cross_member_hit_tokens_total", writer="base", member="plan") == cached
            )
            assert value(now, "heliostat_time_to_first_token_seconds_count", member="plan") == 1
            assert value(now, "heliostat_inter_token_latency_seconds_count", member="plan") == 7
            assert value(now, "heliostat_e2e_request_latency_seconds_count", member="plan") == 1
            assert value(now, "heliostat_request_success_total", member="plan", finished_reason="length") == 1
            assert value(now, "heliostat_num_requests_running", member="plan") == 0
            assert value(now, "heliostat_kv_cache_usage_perc") == 0
            assert value(now, "heliostat_rows_total", module="base") > usage["prompt_tokens"]
            assert value(now, "heliostat_rows_total", module="plan.own") == 8  # it only speaks
            assert value(now, "heliostat_passes_total", module="plan.own") == 8
            assert value(now, "heliostat_idle_pages", writer="base") == (usage["prompt_tokens"] + 7) // 16
            pair = {"member": "code", "other": "plan"}
            assert value(now, "heliostat_prefix_common_tokens_total", **pair) == usage["prompt_tokens"]
            assert value(now, "heliostat_prefix_meetings_total", **pair, outcome="shared") == 1
            await served.chat(LONG, model="solo")
            now = await scraped(served)
            other = {"member": "code", "other": "solo"}
            assert value(now, "heliostat_prefix_meetings_total", **other, outcome="writer") == 1

    run(work())


def test_every_alias_says_the_same(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            await served.chat(LONG)
            now = await scraped(served)
            for name in ALIASES:
                ours = {k: v for k, v in now.items() if k[0].startswith(f"heliostat_{name}")}
                theirs = {k: v for k, v in now.items() if k[0].startswith(f"vllm:{name}")}
                assert len(ours) == len(theirs), name
                assert sorted(ours.values()) == sorted(theirs.values())
            assert value(now, "vllm:generation_tokens_total", model_name="base") == 8

    run(work())


def test_requests_that_run_and_wait_by_member(serving: Serving) -> None:
    async def work() -> None:
        async with serving(max_running=1) as served:
            pace = Pace(engine_of(served.service))
            tasks: list[asyncio.Task[Any]] = []
            for member in ("math", "code"):
                tasks.append(asyncio.create_task(served.chat(LONG, model=member)))
                await until(lambda: served.service.dispatcher.unfinished == len(tasks))
            pace.left = 2
            await pace.spent()
            now = await scraped(served)
            assert value(now, "heliostat_num_requests_running", member="math") == 1
            assert value(now, "heliostat_num_requests_waiting", member="code") == 1
            assert value(now, "heliostat_held_pages", writer="math.own") > 0
            assert 0 < value(now, "heliostat_kv_cache_usage_perc") < 1
            pace.left = 10**6
            await asyncio.gather(*tasks)

    run(work())


def test_a_request_that_is_left_or_refused_is_forgotten(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            await served.chat("a " * 999, status=400)
            await served.chat()
            dispatcher = served.service.dispatcher
            assert dispatcher.unfinished == 0 and not dispatcher._open
            assert dispatcher.router.outstanding("here") == (0, 0)

    run(work())


def test_every_metric_of_the_dashboard_exists(serving: Serving) -> None:
    dashboard = (files("heliostat") / "assets" / "grafana.json").read_text(encoding="utf-8")
    asked = {e for p in json.loads(dashboard)["panels"] for t in p["targets"] for e in [t["expr"]]}
    names = {name for expression in asked for name in re.findall(r"heliostat_\w+", expression)}
    labels = {label for expression in asked for label in re.findall(r"by \(([^)]*)\)", expression)}

    async def work() -> None:
        async with serving(max_running=1) as served:
            for member in ("code", "plan"):
                await served.chat(LONG, model=member)
            pace = Pace(engine_of(served.service), steps=2)
            task = asyncio.create_task(served.chat(LONG))
            await pace.spent()
            text = (await served.client.get("/metrics")).text
            told = set(re.findall(r"^(?:# TYPE )?(heliostat_\w+)", text, flags=re.MULTILINE))
            assert len(names) > 12 and names - told == set()
            assert {name for label in labels for name in label.split(", ")} <= {
                *("le", "member", "other", "outcome", "writer", "module", "status", "finished_reason"),
                *("phase", "worker", "reason"),
            }
            pace.left = 10**6
            await task

    run(work())
