"""The page in a real browser: answers stream in side by side, numbers live, nothing is fetched from elsewhere.

HELIOSTAT_PAGE=1 writes the picture in docs/results.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.house.source import ROOT
from tests.slow.process import served

pytestmark = pytest.mark.slow

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no chromium: apt-get install chromium, or set CHROMIUM", allow_module_level=True)

KEY = "alice-0123456789abcdef"
PROMPT = "A boat left the harbour at noon and came back before dark. Tell me a story about a small boat."
# What happened to each answer, in order: the page itself tells when a text grew and when it was whole.
WATCH = """() => {
  window.told = [];
  new MutationObserver(changes => {
    const seen = new Set();
    for (const change of changes) {
      const card = change.target.nodeType === 1 && change.target.closest("article");
      if (!card || !card.querySelector("pre")) continue;
      const ended = card.querySelector("small").textContent.includes("tokens");
      seen.add((ended ? "end " : "text ") + card.querySelector("b").textContent);
    }
    window.told.push(...seen);
  }).observe(document.getElementById("answers"), {childList: true, subtree: true});
}"""
TEXTS = "() => [...document.querySelectorAll('#answers pre')].map(each => each.textContent)"


@dataclass
class Opened:
    """A page, and what it did."""

    page: Any
    hosts: set[str] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)

    def ask(self, *members: str) -> None:
        """Ask these, and wait until all have answered."""
        for box in self.page.locator("[name=member]").all():
            box.set_checked(box.get_attribute("value") in members)
        self.page.fill("#prompt", PROMPT)
        self.page.fill("#most", "48")
        self.page.evaluate(WATCH)
        self.page.click("#ask button")
        whole = "count => [...document.querySelectorAll('#answers small')]"
        whole += ".filter(each => each.textContent.includes('tokens')).length == count"
        self.page.wait_for_function(whole, arg=len(members))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        # No sandbox: it cannot be had as root, and only our own page is opened.
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, **options: Any) -> Iterator[Opened]:
    context = browser.new_context(**options)
    context.set_default_timeout(30_000)
    found = Opened(context.new_page())
    found.page.on("request", lambda request: found.hosts.add(request.url.split("/")[2]))
    found.page.on("console", lambda said: found.errors.append(said.text) if said.type == "error" else None)
    found.page.on("pageerror", lambda error: found.errors.append(str(error)))
    yield found
    context.close()


@pytest.fixture(scope="module")
def address(embedded_family: Path) -> Iterator[str]:
    with served(embedded_family, "--cache-mib", "64") as (found, _):
        yield found


def test_two_members_answer_side_by_side_while_the_numbers_live(browser: Any, address: str) -> None:
    with opened(browser, viewport={"width": 1120, "height": 900}) as found:
        page = found.page
        page.goto(address)
        before = page.inner_text("#live")
        assert "ready" in before and "no two members have been asked" in before
        found.ask("code", "plan")
        told = page.evaluate("() => window.told")
        ends = [told.index(f"end {member}") for member in ("code", "plan")]
        for member in ("code", "plan"):
            assert told.index(f"text {member}") < min(ends), "both stream before one has ended"
            assert told.count(f"text {member}") > 2, "piece by piece"
        assert all(page.evaluate(TEXTS))
        page.wait_for_function("() => document.getElementById('live').innerText.includes('code and plan')")
        assert "read by" in page.inner_text("#live")
        found.ask("code", "plan", "math")
        page.wait_for_function("() => document.getElementById('live').innerText.includes('code and math')")
        assert found.hosts == {address.removeprefix("http://")} and found.errors == []
        if os.environ.get("HELIOSTAT_PAGE"):
            page.screenshot(path=ROOT / "docs" / "results" / "page.png", full_page=True)


def test_a_narrow_window_and_a_dark_one(browser: Any, address: str, tmp_path: Path) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        with opened(browser, viewport={"width": 390, "height": 800}, color_scheme=scheme) as found:
            found.page.goto(address)
            found.ask("code", "math")
            wide = found.page.evaluate("() => document.documentElement.scrollWidth - window.innerWidth")
            assert wide <= 0, "tables scroll within themselves, the page does not"
            grounds.append(found.page.evaluate("() => getComputedStyle(document.body).backgroundColor"))
            shots = Path(os.environ.get("HELIOSTAT_SHOTS", tmp_path))
            found.page.screenshot(path=shots / f"{scheme}.png", full_page=True)
            assert found.errors == []
    assert len(set(grounds)) == 2


def test_with_a_key(browser: Any, embedded_family: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"{KEY}: {{name: alice, members: [math, code]}}\n", encoding="utf-8")
    with served(embedded_family, "--cache-mib", "16", "--keys", str(keys)) as (address, _):
        with opened(browser) as found:
            found.page.goto(address)
            found.page.fill("#key", "wrong-0123456789abcdef")
            found.page.click("text=Enter")
            found.page.wait_for_selector("text=That is no key")
            found.page.fill("#key", KEY)
            found.page.click("text=Enter")
            found.page.wait_for_selector("#live")
            found.ask("code", "math")
            assert all(found.page.evaluate(TEXTS)) and found.page.locator("[name=member]").count() == 2
            found.page.wait_for_function(
                "() => document.getElementById('live').innerText.includes('code and')"
            )
            found.page.reload()
            found.page.wait_for_selector("#live")
            assert KEY not in found.page.content() and KEY not in found.page.url
            assert found.hosts == {address.removeprefix("http://")}
            assert all("401" in error for error in found.errors), "only of what was asked without the key"
