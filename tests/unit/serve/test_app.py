"""The routes, asked as clients ask them: shapes of answers and streams, usage, choices, limits, leaving, errors."""

import asyncio
from typing import Any

import pytest

from heliostat.llm import LLM
from tests.unit.serve.conftest import Pace, Serving, engine_of, leaving, run, until

LONG = "one two three four five six seven " * 3


def text_of(events: list[Any], place: int = 0) -> str:
    """What one choice of a stream said."""
    choices = [c for e in events[:-1] for c in e["choices"] if c["index"] == place]
    return "".join(c["delta"].get("content", "") if "delta" in c else c["text"] for c in choices)


def test_an_answer_is_the_offline_one(serving: Serving, tiny_family_made: Any) -> None:
    llm = LLM(tiny_family_made, dtype="float32", cache_mib=16)

    async def work() -> None:
        async with serving() as served:
            for member in ("base", "solo", "math", "code", "plan"):
                (wanted,) = llm.generate("add 2 and 3", member=member, max_tokens=8, ignore_eos=True)
                reply = await served.chat(model=member)
                (choice,) = reply["choices"]
                assert choice["message"] == {"role": "assistant", "content": wanted.text}
                assert reply["object"] == "chat.completion" and reply["model"] == member
                assert choice["finish_reason"] == "length" and choice["logprobs"] is None
                assert text_of(await served.stream(model=member)) == wanted.text

    run(work())


def test_a_stream_begins_with_text_and_has_usage_only_where_asked(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            plain = await served.stream()
            assert plain[-1] == "[DONE]"
            assert all(len(event["choices"]) == 1 and "usage" not in event for event in plain[:-1])
            assert plain[0]["choices"][0]["delta"]["role"] == "assistant"
            assert plain[0]["choices"][0]["delta"]["content"]
            assert [e["choices"][0]["finish_reason"] for e in plain[:-1]] == [None] * (len(plain) - 2) + [
                "length"
            ]
            asked = await served.stream(stream_options={"include_usage": True})
            assert [event["usage"] for event in asked[:-2]] == [None] * (len(asked) - 2)
            assert asked[-2]["choices"] == []
            assert asked[-2]["usage"]["completion_tokens"] == 8
            always = await served.stream(
                stream_options={"include_usage": True, "continuous_usage_stats": True}
            )
            counts = [event["usage"]["completion_tokens"] for event in always[:-1]]
            assert counts == sorted(counts) and counts[0] >= 1 and counts[-1] == 8

    run(work())


def test_bare_prompts_and_several_of_them(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            options: dict[str, Any] = {"model": "math", "temperature": 0, "max_tokens": 4, "ignore_eos": True}
            ids = (await served.post("/tokenize", model="math", prompt="add 1"))["tokens"]
            one = await served.post("/v1/completions", prompt="add 1", **options)
            same = await served.post("/v1/completions", prompt=ids, **options)
            assert one["choices"][0]["text"] == same["choices"][0]["text"]
            assert one["object"] == "text_completion"
            two = await served.post("/v1/completions", prompt=["add 1", "say"], n=2, **options)
            assert [c["index"] for c in two["choices"]] == [0, 1, 2, 3]
            assert two["choices"][0]["text"] == two["choices"][1]["text"] == one["choices"][0]["text"]
            assert two["usage"]["completion_tokens"] == 16
            events = await served.stream("/v1/completions", prompt=["add 1", "say"], **options)
            assert text_of(events) == one["choices"][0]["text"]
            assert text_of(events, 1) == two["choices"][2]["text"]

    run(work())


def test_usage_tells_what_was_cached_also_by_another_member(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            first = (await served.chat(LONG, model="code"))["usage"]
            again = (await served.chat(LONG, model="plan"))["usage"]
            assert first["prompt_tokens_details"] == {"cached_tokens": 0}
            assert again["prompt_tokens_details"]["cached_tokens"] >= 16
            assert again["total_tokens"] == again["prompt_tokens"] + again["completion_tokens"]
            metrics = (await served.client.get("/metrics")).text
            assert 'heliostat_cross_member_hit_tokens_total{member="plan",writer="base"}' in metrics

    run(work())


def test_choices_differ_and_a_seed_repeats_them(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            warm: dict[str, Any] = {"temperature": 1.5, "n": 3, "seed": 7}
            one, two = await served.chat(**warm), await served.chat(**warm)
            texts = [c["message"]["content"] for c in one["choices"]]
            assert texts == [c["message"]["content"] for c in two["choices"]]
            assert len(set(texts)) == 3 and [c["index"] for c in one["choices"]] == [0, 1, 2]
            assert one["usage"]["completion_tokens"] == 24
            free = [await served.chat(temperature=1.5) for _ in range(3)]
            assert len({reply["choices"][0]["message"]["content"] for reply in free}) == 3
            streamed = await served.stream(**warm)
            assert [text_of(streamed, place) for place in range(3)] == texts

    run(work())


def test_a_stop_string_ends_an_answer_and_stays_out_of_it(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            whole = (await served.chat())["choices"][0]["message"]["content"]
            stop = whole[4:6]
            cut = (await served.chat(stop=stop))["choices"][0]
            assert cut["message"]["content"] == whole[: whole.index(stop)]
            assert cut["finish_reason"] == "stop"
            same = await served.stream(stop=[stop, "never"])
            assert text_of(same) == cut["message"]["content"]
            assert (await served.chat(stop=None))["choices"][0]["message"]["content"] == whole

    run(work())


def test_logprobs(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            reply = await served.chat(logprobs=True, top_logprobs=2)
            content = reply["choices"][0]["logprobs"]["content"]
            assert len(content) == 8
            for token in content:
                assert token["logprob"] <= 0 and len(token["top_logprobs"]) == 2
                assert token["top_logprobs"][0]["logprob"] == token["logprob"]  # greedy
                assert bytes(token["bytes"]).decode() == token["token"]
            events = await served.stream(logprobs=True, top_logprobs=2)
            assert [t for e in events[:-1] for t in e["choices"][0]["logprobs"]["content"]] == content
            options: dict[str, Any] = {"model": "base", "temperature": 0, "max_tokens": 4, "ignore_eos": True}
            text = await served.post("/v1/completions", prompt="add 1", logprobs=1, **options)
            found = text["choices"][0]["logprobs"]
            assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["text_offset"]) == 4
            assert all(len(top) == 1 for top in found["top_logprobs"])

    run(work())


def test_tokens_there_and_back(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            found = await served.post("/tokenize", model="base", prompt="add 2", return_token_strs=True)
            assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
            assert found["max_model_len"] == 256
            back = await served.post("/detokenize", model="base", tokens=found["tokens"])
            assert back == {"prompt": "add 2"}
            turns = [{"role": "user", "content": "add 2"}]
            longer = await served.post("/tokenize", model="base", messages=turns)
            assert longer["count"] > found["count"]
            await served.post("/detokenize", 400, model="base", tokens=[10**6])
            await served.post("/tokenize", 400, model="base")
            await served.post("/tokenize", 404, model="nobody", prompt="a")

    run(work())


def test_models_are_members(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            cards = {card["id"]: card for card in (await served.get("/v1/models"))["data"]}
            assert set(cards) == {"base", "solo", "math", "code", "plan"}
            assert cards["math"]["root"] == "math" and cards["math"]["parent"] == "base"
            assert cards["base"]["parent"] is None and cards["math"]["max_model_len"] == 256
            assert await served.get("/v1/models/math") == cards["math"]
            assert (await served.get("/v1/models/other", 404))["error"]["code"] == "model_not_found"

    run(work())


def test_an_unknown_model_is_404_and_never_the_base(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            for name in ("nobody", "", "base@v2", "math@", "math@v1@v1", "\ud800"):
                error = (await served.chat(model=name, status=404))["error"]
                assert error["param"] == "model" and error["code"] == "model_not_found"
            assert served.service.in_flight == 0

    run(work())


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 422, "temperature"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"n": 0}, 400, "n"),
        ({"n": 1000}, 400, "n"),
        ({"top_logprobs": 3}, 400, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 99}, 400, "logprobs"),
        ({"stop": [""]}, 400, None),
        ({"stop": ["a"] * 99}, 400, "stop"),
        ({"stop": "a" * 999}, 400, "stop"),
        ({"logit_bias": {"5": 101}}, 400, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, 400, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(2000)}}, 400, "logit_bias"),
        ({"best_of": 2}, 400, "best_of"),
        ({"echo": True}, 400, "echo"),
        ({"cache_salt": "mine"}, 400, "cache_salt"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, 400, None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "a " * 999}]}, 400, None),
        ({"messages": "hello"}, 422, "messages"),
        ({"model": None}, 422, "model"),
        ({"deep": [[[[]]]], "max_tokens": True}, 200, None),
        ({"best_of": None, "n": None, "top_k": -1, "user": "me", "seed": -3}, 200, None),
    ],
)
def test_what_is_refused_names_the_field(
    serving: Serving, fields: dict[str, Any], status: int, param: str | None
) -> None:
    async def work() -> None:
        async with serving() as served:
            reply = await served.chat(status=status, **fields)
            if status != 200:
                assert set(reply["error"]) == {"message", "type", "param", "code"}
                assert reply["error"]["param"] == param, reply
            assert served.service.in_flight == 0 and await served.held() == 0

    run(work())


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"a"', b"\xff", b'{"model": NaN}', b'{"a":' * 99 + b"1" + b"}" * 99, b"[" * 10**5],
)
def test_a_body_that_is_no_request(serving: Serving, body: bytes) -> None:
    async def work() -> None:
        async with serving() as served:
            reply = await served.client.post("/v1/chat/completions", content=body)
            assert reply.status_code in (400, 422) and reply.json()["error"]["message"]

    run(work())


def test_a_body_too_large(serving: Serving) -> None:
    async def work() -> None:
        async with serving(max_body_mib=1) as served:
            reply = await served.client.post("/v1/chat/completions", content=b" " * (2**20 + 1))
            assert reply.status_code == 413 and reply.json()["error"]["code"] == "body_too_large"

    run(work())


def test_unknown_fields_are_ignored_with_one_warning(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            for _ in range(3):
                await served.chat(sparkle=1, user="me")
            (warning,) = [line for line in served.lines if line["event"] == "warning"]
            assert "'sparkle'" in warning["message"]

    run(work())


def test_paths_and_methods_that_there_are_not(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            assert (await served.get("/v1/nothing", 404))["error"]["type"] == "not_found_error"
            assert (await served.get("/v1/chat/completions", 405))["error"]["message"]

    run(work())


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("steps", [0, 1, 2, 5, 12, 20])
def test_a_client_that_leaves_gives_its_pages_back(serving: Serving, stream: bool, steps: int) -> None:
    async def work() -> None:
        async with serving() as served:
            pace, gone = Pace(engine_of(served.service)), asyncio.Event()
            body = {
                "model": "plan",
                "prompt": LONG,
                "n": 2,
                "max_tokens": 12,
                "stream": stream,
                "ignore_eos": True,
            }
            asked = asyncio.create_task(leaving(served.app, "/v1/completions", body, gone))
            await until(lambda: served.service.in_flight == 1)
            pace.left = steps
            if steps < 12:
                await pace.spent()
                assert served.service.in_flight == 1
            gone.set()
            await asked
            assert served.service.in_flight == served.service.dispatcher.unfinished == 0
            assert await served.held() == 0
            assert not engine_of(served.service).unfinished
            pace.left = 10**6
            await served.chat()

    run(work())


def test_a_client_that_leaves_while_it_is_queued(serving: Serving) -> None:
    async def work() -> None:
        async with serving(max_running=1) as served:
            Pace(engine_of(served.service), steps=2)
            body = {"model": "base", "prompt": "add", "max_tokens": 12, "stream": True}
            ends = [asyncio.Event() for _ in range(3)]
            tasks = [asyncio.create_task(leaving(served.app, "/v1/completions", body, end)) for end in ends]
            await until(lambda: served.service.dispatcher.unfinished == 3)
            for end, task, left in zip(reversed(ends), reversed(tasks), (2, 1, 0), strict=True):
                end.set()
                await task
                assert served.service.dispatcher.unfinished == left
            assert await served.held() == 0

    run(work())


def test_a_full_queue_is_429_and_then_it_goes_on(serving: Serving) -> None:
    async def work() -> None:
        async with serving(max_running=2, max_waiting=1) as served:
            pace = Pace(engine_of(served.service))
            tasks = [asyncio.create_task(served.chat()) for _ in range(3)]
            await until(lambda: served.service.dispatcher.unfinished == 3)
            body = {"model": "base", "messages": [{"role": "user", "content": "a"}]}
            reply = await served.client.post("/v1/chat/completions", json=body)
            assert reply.status_code == 429 and int(reply.headers["retry-after"]) >= 1
            assert reply.json()["error"]["type"] == "rate_limit_error"
            assert served.service.in_flight == 3
            pace.left = 10**6
            assert (
                len({reply["choices"][0]["message"]["content"] for reply in await asyncio.gather(*tasks)})
                == 1
            )
            await served.chat()
            assert 'requests_refused_total{status="429"} 1.0' in (await served.client.get("/metrics")).text

    run(work())


def test_a_request_past_its_deadline_ends_with_an_error(serving: Serving) -> None:
    async def work() -> None:
        async with serving(deadline=0.05) as served:
            pace = Pace(engine_of(served.service), steps=3)
            error = (await served.chat(status=503))["error"]
            assert error["code"] == "deadline" and await served.held() == 0
            whole: dict[str, Any] = {
                "messages": [{"role": "user", "content": "add 2 and 3"}],
                "model": "base",
                "stream": True,
            }
            error = (await served.post("/v1/chat/completions", 503, **whole))["error"]
            assert error["code"] == "deadline", "nothing was told before, so the status tells it"
            pace.left = 3
            events = await served.stream()
            assert events[-2]["error"]["code"] == "deadline" and events[-1] == "[DONE]"
            assert await served.held() == 0

    run(work())


def ids_of(events: list[Any], index: int = 0) -> list[int]:
    """The token ids of a choice, as its chunks tell them."""
    chunks = [choice for event in events[:-1] for choice in event["choices"] if choice["index"] == index]
    return [token for choice in chunks for token in choice["token_ids"]]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"n": 3, "temperature": 1.5, "seed": 3},
        {"presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"stop": "STOP"},
        {"max_tokens": 40, "ignore_eos": False},
    ],
    ids=["plain", "choices", "penalties", "stop", "end"],
)
@pytest.mark.parametrize("chat", [True, False])
def test_token_ids_are_what_was_said(serving: Serving, more: dict[str, Any], chat: bool) -> None:
    async def work() -> None:
        async with serving() as served:
            path = "/v1/chat/completions" if chat else "/v1/completions"
            asked: dict[str, Any] = {"model": "plan", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
            asked |= {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "add 1"}
            whole = await served.post(path, **(asked | more | {"stop": None}))
            text = whole["choices"][0]["message"]["content"] if chat else whole["choices"][0]["text"]
            asked |= more | ({"stop": text[3:5]} if "stop" in more else {}) | {"return_token_ids": True}
            reply = await served.post(path, **asked)
            events = await served.stream(path, **asked)
            sizes = 0
            for choice in reply["choices"]:
                ids = choice["token_ids"]
                assert ids_of(events, choice["index"]) == ids, "a stream tells the same"
                assert text_of(events, choice["index"]) == (
                    choice["message"]["content"] if chat else choice["text"]
                )
                said = served.service.tokenizer.decode(ids, skip_special=True)
                assert said.startswith(text_of(events, choice["index"]).rstrip("\ufffd"))
                sizes += len(ids)
            assert sizes == reply["usage"]["completion_tokens"], "the end token is one of them"
            body = {"messages": asked["messages"]} if chat else {"prompt": asked["prompt"]}
            prompt = (await served.post("/tokenize", model="plan", **body))["tokens"]
            for found in (reply, events[0]):
                where = found if chat else found["choices"][0]
                assert where["prompt_token_ids"] == prompt
            later = [e for e in events[:-1] if e["choices"][0]["index"] == 0][1:]
            assert all("prompt_token_ids" not in e | e["choices"][0] for e in later), "told once"
            plain = await served.post(path, **(asked | {"return_token_ids": False}))
            assert "token_ids" not in plain["choices"][0] and "prompt_token_ids" not in plain

    run(work())


def test_timings_are_told_only_to_who_asks(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            usage = (await served.chat(timings=True, n=2))["usage"]
            for timings in usage["heliostat_timings"]:
                parts = [timings[name] for name in ("queue", "prefill", "transfer", "decode")]
                assert parts[2] == 0.0 and min(parts) >= 0 and 0 < sum(parts) <= timings["total"] * 1.5
            assert "heliostat_timings" not in (await served.chat())["usage"]
            events = await served.stream(timings=True, stream_options={"include_usage": True})
            assert len(events[-2]["usage"]["heliostat_timings"]) == 1
            nowhere: dict[str, Any] = {"timings": True, "stream": True}
            assert "include_usage" in (await served.chat(status=400, **nowhere))["error"]["message"]

    run(work())
