"""A real server that drafts, asked by the official client at once with all there is: the same answers, and the counts."""

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.slow.process import served

pytestmark = pytest.mark.slow

MEMBERS = ("base", "solo", "math", "code", "plan")
SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "n", "schema": {"enum": ["one", "two"]}, "strict": True},
}
WAYS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 0, "logprobs": True, "top_logprobs": 2},
    {"temperature": 0, "stop": ["e"], "presence_penalty": 1.0},
    {"temperature": 1.0, "seed": 5, "n": 2, "top_p": 0.9},
    {"temperature": 0, "response_format": SCHEMA},
]


def answers(address: str, **extra: Any) -> list[Any]:
    """Of every member in every way, all at once: (texts, reasons) and the usage."""
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")

    def ask(job: tuple[str, dict[str, Any]]) -> Any:
        member, way = job
        reply = client.chat.completions.create(
            model=member,
            messages=[{"role": "user", "content": "add 2 and 3, add 2 and 3, add 2"}],
            max_tokens=40,
            extra_body=extra,
            **way,
        )
        told = [(choice.message.content, choice.finish_reason) for choice in reply.choices]
        return told, reply.usage.model_dump() if reply.usage else {}

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(ask, [(member, way) for member in MEMBERS for way in WAYS]))


@pytest.mark.parametrize(
    "options",
    [
        ("--draft", "solo.own", "--ahead", "4"),
        ("--draft", "ngram"),
        ("--draft", "ngram", "--prefill-workers", "1", "--decode-workers", "1", "--device", "cpu"),
        ("--draft", "base", "--prefill-workers", "1", "--decode-workers", "1", "--device", "cpu"),
    ],
    ids=" ".join,
)
def test_a_server_that_drafts_answers_as_one_that_does_not(
    tiny_family: Path, options: tuple[str, ...]
) -> None:
    with served(tiny_family, *options, "--cache-mib", "16") as (address, _):
        plain, drafted = answers(address, speculation="off"), answers(address)
        assert [told for told, _ in drafted] == [told for told, _ in plain]
        assert all("speculation" not in usage for _, usage in plain)
        counts = [usage["speculation"] for _, usage in drafted]
        assert {each["rule"] for each in counts} == {"lossless"}
        total = sum(each["drafted"] for each in counts)
        assert total > 0  # whatever is faster here, it is tried now and then
        text = urllib.request.urlopen(f"{address}/metrics").read().decode()
        counted = [line for line in text.splitlines() if line.startswith("heliostat_drafted_tokens_total{")]
        found = [float(line.rpartition(" ")[2]) for line in counted]
        assert sum(found) == total
        body = json.dumps({"model": "base", "prompt": "a", "speculation": "judged"}).encode()
        request = urllib.request.Request(
            f"{address}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError, match="400") as refused:
            urllib.request.urlopen(request)
        assert "is not allowed here" in refused.value.read().decode()
