"""Nobody gets in: keys, hosts, origins; request ids; what a fault tells, and what the log has of it all."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from heliostat.serve.gate import OPEN_PATHS
from tests.unit.serve.conftest import KEYS, Serving, bearer, run

ALICE, BOB, ROOT = KEYS
LONG = "one two three four five six seven " * 3


def test_without_a_key_every_route_but_health_is_closed(serving: Serving, keys_file: Path) -> None:
    async def work() -> None:
        async with serving(keys=keys_file) as served:
            routes = [(r.path, m) for r in served.app.routes for m in getattr(r, "methods", None) or ()]
            assert len(routes) > 15
            for (path, method), key in itertools.product([*routes, ("/nowhere", "GET")], ["", "wrong-" * 4]):
                path = path.replace("{member}", "math").replace("{name:path}", "math")
                reply = await served.client.request(method, path, headers=bearer(key))
                assert reply.status_code == (200 if path in OPEN_PATHS and method == "GET" else 401), path
                assert not any(key in reply.text for key in KEYS)

    run(work())


def test_a_key_sees_and_asks_its_own_members(serving: Serving, keys_file: Path) -> None:
    async def work() -> None:
        async with serving(keys=keys_file) as served:
            seen = await served.get("/v1/models", key=ALICE)
            assert {card["id"] for card in seen["data"]} == {"math", "code"}
            assert len((await served.get("/v1/models", key=BOB))["data"]) == 5
            await served.chat(model="math", key=ALICE)
            error = (await served.chat(model="base", key=ALICE, status=404))["error"]
            assert "base" not in error["message"].partition(";")[2]
            await served.post("/tokenize", 404, ALICE, model="solo", prompt="a")
            await served.get("/v1/models/solo", 404, ALICE)
            await served.chat(model="base", key=BOB)
            await served.post("/admin/members/math/unload", key=ROOT)
            error = (await served.chat(model="math", key=ALICE, status=404))["error"]
            assert error["message"].endswith("there is: code"), "others' members are not told"

    run(work())


def test_metrics_and_members_are_for_admins(serving: Serving, keys_file: Path) -> None:
    async def work() -> None:
        async with serving(keys=keys_file) as served:
            for path in ("/metrics", "/admin/members"):
                assert (await served.get(path, 403, BOB))["error"]["code"] == "not_admin"
                assert (await served.client.get(path, headers=bearer(ROOT))).status_code == 200
            await served.post("/admin/members/math/unload", 403, BOB)
            await served.chat(model="math", key=BOB)

    run(work())


def test_pages_are_shared_under_one_key_and_not_under_another(serving: Serving, keys_file: Path) -> None:
    async def work() -> None:
        async with serving(keys=keys_file) as served:

            async def cached(key: str, **fields: Any) -> int:
                usage = (await served.chat(LONG, model="math", key=key, **fields))["usage"]
                return int(usage["prompt_tokens_details"]["cached_tokens"])

            assert await cached(ALICE) == 0
            assert await cached(ALICE) > 0
            assert await cached(BOB) == 0
            assert await cached(BOB) > 0
            assert await cached(ROOT, user="alice", salt="alice") == 0

    run(work())


def test_no_key_in_logs_or_answers(serving: Serving, keys_file: Path) -> None:
    async def work() -> None:
        async with serving(keys=keys_file) as served:
            await served.chat(model="math", key=ALICE)
            await served.get("/v1/models", 401, ALICE + "x")
            await served.client.get(f"/{ALICE}", headers=bearer(ALICE))
            await served.client.get(f"/v1/models?key={ALICE}", headers=bearer(ALICE))
            log = served.log.getvalue()
            assert not any(key in log for key in KEYS) and '"tenant": "alice"' in log

    run(work())


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("[::1]:8000", 200),
        ("10.1.2.3", 200),
        ("my.example:443", 200),
        ("evil.example", 400),
        ("localhost.evil.example", 400),
        ("localhost@evil.example", 400),
        ("localhost/../x", 400),
        ("127.0.0.1:8000, evil.example", 400),
        ("", 400),
        ("999.1.1.1", 400),
        ("localhost:port", 400),
    ],
)
def test_hosts(serving: Serving, host: str, status: int) -> None:
    async def work() -> None:
        async with serving(allow_hosts=["My.Example"]) as served:
            for path in ("/v1/models", "/health"):
                reply = await served.client.get(path, headers={"Host": host})
                assert reply.status_code == status, (path, reply.text)

    run(work())


def test_pages_of_other_origins_cannot_ask(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            for origin, status in (
                ("http://127.0.0.1:8000", 200),
                ("https://evil.example", 403),
                ("null", 403),
            ):
                reply = await served.client.get("/v1/models", headers={"Origin": origin})
                assert reply.status_code == status, origin

    run(work())


def test_a_request_id_is_echoed_where_it_is_harmless(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            for given, kept in (("abc-1.2_3:4", True), ("a b", False), ("x" * 200, False), ("", False)):
                reply = await served.client.get("/v1/models", headers={"X-Request-ID": given})
                assert (reply.headers["x-request-id"] == given) is kept
                assert served.lines[-1]["request_id"] == reply.headers["x-request-id"]
            reply = await served.client.post(
                "/v1/completions", content="{", headers={"X-Request-ID": "bad-1"}
            )
            assert reply.status_code == 400 and reply.headers["x-request-id"] == "bad-1"

    run(work())


def test_the_log_has_a_line_a_request(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            await served.chat("a secret")
            await served.stream()
            await served.get("/health")
            await served.get("/secret/path", 404)
            whole, streamed, unknown = served.lines
            assert whole["path"] == "/v1/chat/completions" and whole["member"] == "base@v1"
            assert whole["completion_tokens"] == streamed["completion_tokens"] == 8 and whole["seconds"] >= 0
            assert unknown["path"] == "(unknown)" and unknown["status"] == 404
            assert "secret" not in served.log.getvalue()

    run(work())


def test_a_fault_tells_the_client_nothing_and_the_log_everything(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with serving() as served:

            def broken(*_: Any) -> None:
                raise ZeroDivisionError("/home/somebody/secret")

            monkeypatch.setattr(served.service.roster, "seats", {"math": property(broken)})
            error = (await served.get("/v1/models", 500))["error"]
            assert (
                "/" not in error["message"] and "secret" not in str(error) and "Traceback" not in str(error)
            )
            fault = next(line for line in served.lines if line["event"] == "fault")
            assert "Traceback" in fault["trace"] and fault["request_id"] == served.lines[-1]["request_id"]

    run(work())
