"""Real clients, unchanged, against a real ``heliostat serve`` over a socket."""

import asyncio
import json
import os
import shutil
import signal
import ssl
import subprocess
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.slow.process import served

pytestmark = pytest.mark.slow

KEY = "alice-0123456789abcdef"
ASKED: Any = [{"role": "user", "content": "add 2 and 3"}]
TEMPLATE = (
    "{% for t in tools or [] %}tool {{ t.function.name }}; {% endfor %}"
    "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "pick",
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    },
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "one", "schema": {"enum": ["red", "blue"]}}}


def test_models(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} == {"base", "solo", "math", "code", "plan"}
    assert client.models.retrieve("math").id == "math"


def test_one_answer_in_every_way(client: openai.OpenAI, address: str) -> None:
    options: Any = {"model": "math", "messages": ASKED, "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    text = whole.choices[0].message.content
    assert whole.usage and whole.usage.prompt_tokens_details is not None and whole.choices[0].logprobs
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert all(chunk.choices[0] is not None for chunk in chunks)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text

    async def later() -> str:
        async with openai.AsyncOpenAI(base_url=address, api_key="none") as client:
            replies = await asyncio.gather(*(client.chat.completions.create(**options) for _ in range(8)))
            assert {reply.choices[0].message.content for reply in replies} == {text}
            stream = await client.chat.completions.create(
                **options, stream=True, stream_options={"include_usage": True}
            )
            pieces = [chunk async for chunk in stream]
            assert pieces[-1].usage and not pieces[-1].choices
            return "".join(chunk.choices[0].delta.content or "" for chunk in pieces[:-1])

    assert asyncio.run(later()) == text


def test_bare_text(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="code", prompt=["add", "say"], n=2, max_tokens=4, logprobs=1)
    assert len(reply.choices) == 4 and reply.choices[0].logprobs


def test_json_schema(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="plan", messages=ASKED, response_format=FORMAT)
    assert json.loads(reply.choices[0].message.content or "") in ("red", "blue")


def test_tools(make_checkpoint: Any, tmp_path: Path) -> None:
    from heliostat.build import init_family

    base = make_checkpoint(seed=4)
    (base / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    init_family(tmp_path / "fam", base)
    with served(tmp_path / "fam", "--cache-mib", "16") as (found, _):
        with openai.OpenAI(base_url=f"{found}/v1", api_key="none") as client:
            spaces: dict[str, int] = {}
            for word in (" ", "\n", "\t"):
                reply = httpx2.post(f"{found}/tokenize", json={"model": "base", "prompt": word})
                spaces |= {str(token): -100 for token in reply.json()["tokens"]}
            options: Any = {"model": "base", "messages": ASKED, "tools": [TOOL], "logit_bias": spaces}
            forced = client.chat.completions.create(**options, tool_choice="required").choices[0]
            assert forced.finish_reason == "tool_calls" and forced.message.tool_calls
            assert forced.message.tool_calls[0].function.name == "pick"
            free = client.chat.completions.create(**options, max_tokens=5)
            assert free.choices[0].message.tool_calls is None


def test_errors_are_the_ones_clients_know(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="nobody", messages=ASKED)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="math", messages=ASKED, temperature=-1)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.UnprocessableEntityError):
        wrong_kind: Any = "hello"
        client.chat.completions.create(model="math", messages=wrong_kind)


def test_keys(tiny_family_made: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"{KEY}: {{name: alice, members: [math]}}\n", encoding="utf-8")
    with served(tiny_family_made, "--cache-mib", "16", "--keys", str(keys)) as (found, _):
        with openai.OpenAI(base_url=f"{found}/v1", api_key=KEY) as client:
            assert [model.id for model in client.models.list()] == ["math"]
        with openai.OpenAI(base_url=f"{found}/v1", api_key="wrong") as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()


def test_tls(tiny_family_made: Path, tmp_path: Path) -> None:
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("openssl makes the certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    made = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *names]
    subprocess.run([openssl, *made, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    options = ["--cache-mib", "16", "--tls-cert", str(certificate), "--tls-key", str(key)]
    with served(tiny_family_made, *options) as (found, _):
        assert found.startswith("https://")
        trusting = ssl.create_default_context(cafile=str(certificate))
        assert httpx2.get(f"{found}/health", verify=trusting).status_code == 200
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{found}/health")


def test_a_signal_while_it_answers(tiny_family_made: Path) -> None:
    with served(tiny_family_made, "--cache-mib", "16") as (found, process):
        with openai.OpenAI(base_url=f"{found}/v1", api_key="none") as client:
            stream = client.chat.completions.create(
                model="plan", messages=ASKED, max_tokens=200, extra_body={"ignore_eos": True}, stream=True
            )
            first = next(iter(stream))
            os.kill(process.pid, signal.SIGTERM)
            assert first.choices and [*stream][-1].choices[0].finish_reason == "length"
        assert process.wait(60) == 0
