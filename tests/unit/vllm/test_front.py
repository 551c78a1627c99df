"""What stands before a worker's requests: what it is, what it turns away, and that the rest goes on as it came."""

import asyncio
import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import pytest
import torch

from heliostat.vllm import kept, wire
from heliostat.vllm.asked import Settings
from heliostat.vllm.front import Front
from heliostat.vllm.launch import Hosted, Launch, settings

B, W = "b" * 64, "f" * 64
BASE = Hosted(name="base", digest=B, folder="/b")


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Says what it was asked."""
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


def front(role: Any, folder: Path | str = "/nowhere", **more: Any) -> Front:
    launch = Launch(name="w", weights=BASE, role=role, fit="f", folder=str(folder), **more)
    return Front(app, Settings(**settings(launch)))


def ask(
    asked: Front, path: str, body: Any = None, *, method: str = "POST", key: str = "", parts: int = 1
) -> tuple[int, Any, str]:
    """Status, body, code."""
    data = b"" if body is None else json.dumps(body).encode()
    size = -(-len(data) // parts) or 1
    pieces = [data[n : n + size] for n in range(0, len(data), size)] or [b""]
    messages = [
        {"type": "http.request", "body": piece, "more_body": n < len(pieces) - 1}
        for n, piece in enumerate(pieces)
    ]
    said: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        said.append(message)

    headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
    asyncio.run(asked({"type": "http", "method": method, "path": path, "headers": headers}, receive, send))
    found = dict(said[0]["headers"])
    text = b"".join(message["body"] for message in said[1:])
    return (
        said[0]["status"],
        json.loads(text) if text else None,
        found.get(wire.CODE.lower().encode(), b"").decode(),
    )


COMPLETIONS = "/v1/completions"


def request(params: Any, ids: Any = (5, 6, 7)) -> dict[str, Any]:
    prompt = ids if isinstance(ids, str) else list(ids)
    return {"model": BASE.model, "prompt": prompt, wire.PARAMS: params, "max_tokens": 1}


def test_it_says_what_the_worker_is() -> None:
    status, body, _ = ask(front("prefill"), wire.DESCRIBED, method="GET")
    described = msgspec.convert(body, wire.Described)
    assert status == 200 and described.role == "prefill" and described.modules == {BASE.model: B}
    assert described.fit == "f" and described.transfer == "files"
    assert ask(front("both"), wire.DESCRIBED, method="GET")[1]["transfer"] == ""


def test_its_own_paths_ask_for_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    for path, method in ((wire.DESCRIBED, "GET"), (wire.RELEASE, "POST")):
        assert ask(front("prefill"), path, {}, method=method)[0] == 401
        assert ask(front("prefill"), path, {}, method=method, key="other")[0] == 401
    assert ask(front("prefill"), wire.DESCRIBED, method="GET", key="secret")[0] == 200


def test_who_has_no_key_learns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    wrong = request(wire.alone(W))
    assert ask(front("decode"), COMPLETIONS, wrong)[:2] == (200, wrong), "vLLM itself turns it away"
    assert ask(front("decode"), COMPLETIONS, wrong, key="secret")[2] == "module_missing"


@pytest.mark.parametrize("parts", [1, 3])
def test_what_is_right_goes_on_as_it_came(parts: int) -> None:
    body = request(wire.keep(B, 3))
    assert ask(front("prefill"), COMPLETIONS, body, parts=parts)[:2] == (200, body)
    assert ask(front("both"), COMPLETIONS, {"model": "x", "prompt": "text"})[0] == 200
    assert ask(front("decode"), "/v1/models", method="GET")[0] == 200
    assert ask(front("decode"), COMPLETIONS, request(wire.alone(B)))[0] == 200


@pytest.mark.parametrize(
    ("role", "body", "code"),
    [
        ("decode", request(None), "refused"),
        ("decode", request(wire.alone(W)), "module_missing"),
        ("both", request(wire.alone(W)), "module_missing"),
        ("prefill", request(wire.keep(W, 3)), "module_missing"),
        ("prefill", request(wire.keep(B, 2)), "refused"),
        ("prefill", request(wire.keep(B, 3), "a text"), "refused"),
    ],
)
def test_what_must_not_run_is_turned_away_with_the_reason(role: str, body: Any, code: str) -> None:
    status, said, found = ask(front(role), COMPLETIONS, body)
    assert (status, found) == (409, code)
    assert said["error"]["message"] and said["error"]["type"] == code


def test_what_is_not_there_any_more_is_told_before_anything_runs(tmp_path: Path) -> None:
    folder = kept.private_folder(str(tmp_path / "handed"))
    shelf = kept.Shelf(folder, "me", 1 << 20, 60.0)
    ids, name = [5, 6, 7], f"me-{uuid4().hex}"
    label = kept.Label(W, 2, wire.tokens_digest(ids[:2]), "f", "layout", "0/1")
    shelf.write(name, label, {"layer": torch.zeros(1, 2)})
    said = {"do_remote_prefill": True, "do_remote_decode": False, "handle": name, "fit": "f"}
    asked = front("decode", tmp_path / "handed")
    right = request(wire.load(said, W, 2), ids)
    assert ask(asked, COMPLETIONS, right)[0] == 200
    for wrong in (request(wire.load(said, B, 2), ids), request(wire.load(said, W, 2), [5, 8, 7])):
        assert ask(asked, COMPLETIONS, wrong)[2] == "pages_gone"
    assert ask(front("prefill", tmp_path / "handed"), wire.RELEASE, {"handle": name})[0] == 204
    assert ask(asked, COMPLETIONS, right)[2] == "pages_gone"
    assert ask(asked, wire.RELEASE, {"handle": name})[0] == 204, "twice is no error"
    assert ask(asked, wire.RELEASE, {"handel": name})[0] == 400


def test_two_streams_know_no_logprobs_of_prompts() -> None:
    body = {**request(wire.alone(B)), "prompt_logprobs": 1}
    assert ask(front("both", two_streams=True), COMPLETIONS, body)[2] == "refused"
    assert ask(front("both"), COMPLETIONS, body)[0] == 200


def test_a_process_of_somebody_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HELIOSTAT_WORKER", raising=False)
    assert ask(Front(app), COMPLETIONS, {"model": "x"})[0] == 200


def test_a_body_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heliostat.vllm.front.MAX_BODY", 10)
    assert ask(front("prefill"), COMPLETIONS, request(wire.keep(B, 3)), parts=4)[0] == 413
