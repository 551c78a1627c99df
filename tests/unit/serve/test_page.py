"""The page: told by the server, whole without anything from elsewhere, closed without a key."""

import re
from pathlib import Path

from heliostat.engine.prefixes import Outcome
from heliostat.serve.page import WHY
from tests.unit.serve.conftest import KEYS, Serving, bearer, run

LONG = "one two three four five six seven " * 3


def why(outcome: Outcome) -> str:
    return WHY[outcome]


def test_it_tells_members_and_what_they_share(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            for member in ("code", "plan"):
                await served.chat(LONG, model=member)
            text = (await served.client.get("/")).text
            assert all(f"<b>{member}</b>" in text for member in ("base", "solo", "math", "code", "plan"))
            assert "written by base" in text and "read by plan" in text and "ready" in text
            assert "<b>code</b> and <b>plan</b>" in text and "pages" in text
            assert why("writer") not in text
            await served.chat(LONG, model="solo")
            assert why("writer") in (await served.client.get("/page")).text
            part = (await served.client.get("/page")).text
            text = (await served.client.get("/")).text
            assert "<html" not in part and "<b>plan</b>" in part and part.strip() in text

    run(work())


def test_it_fetches_nothing_from_elsewhere(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            reply = await served.client.get("/")
            text = reply.text.replace('<link rel="icon" href="data:,">', "")  # or browsers ask for one
            assert not re.findall(r"https?://|//\w+\.\w+|<link|<img|src=|@import", text)
            assert "default-src 'none'" in reply.headers["content-security-policy"]

    run(work())


def test_without_a_key_it_asks_for_one_and_tells_nothing(serving: Serving, keys_file: Path) -> None:
    async def work() -> None:
        async with serving(keys=keys_file) as served:
            for key in ("", "wrong-0123456789abcdef"):
                reply = await served.client.get("/", headers=bearer(key))
                assert reply.status_code == 401 and 'type="password"' in reply.text
                assert "math" not in reply.text and "pages" not in reply.text.partition("<body>")[2]
            alice, bob, _ = KEYS
            for member in ("math", "code", "solo"):
                await served.chat(LONG, model=member, key=bob)
            mine = (await served.client.get("/", headers=bearer(alice))).text
            assert "<b>code</b> and <b>math</b>" in mine and "solo" not in mine
            assert ">math.own<" in mine and ">others<" in mine, (
                "pages of a member that is not hers have no name"
            )
            assert "<b>math</b>" in mine and "<b>solo</b>" not in mine and alice not in mine
            await served.get("/page", 401)
            assert "<b>solo</b>" in (await served.client.get("/page", headers=bearer(bob))).text

    run(work())


def test_a_name_is_text_and_no_markup(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            seats = served.service.roster.seats
            seats["<script>x</script>"] = seats["math"]
            assert "<script>x" not in (await served.client.get("/")).text

    run(work())
