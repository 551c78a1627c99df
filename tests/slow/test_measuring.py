"""Programs that measure and probe servers, unchanged, against a real ``heliostat serve``.

Where one does not fit into this environment, HELIOSTAT_GUIDELLM or HELIOSTAT_LM_EVAL says where it is.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx2
import pytest

from heliostat.llm import LLM
from tests.slow.process import served

pytestmark = pytest.mark.slow

TASK = """
task: adding
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{said}}"
generation_kwargs: {until: ["|"], max_gen_toks: 8, temperature: 0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def address(embedded_family: Path) -> Iterator[str]:
    with served(embedded_family, "--cache-mib", "64") as (found, _):
        yield found


def program(name: str, variable: str) -> str:
    """Where it is; the test is skipped where it is not."""
    here = Path(sys.executable).parent / name
    found = os.environ.get(variable) or shutil.which(here) or shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} here: pip install it, or set {variable} to its path in another environment")
    return found


def run(*command: str | Path, folder: Path) -> str:
    """What it says; fails with it where the program does."""
    environment = {**os.environ, **OFFLINE}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_guidellm(address: str, tmp_path: Path) -> None:
    guidellm = program("guidellm", "HELIOSTAT_GUIDELLM")
    base = files("heliostat") / "assets" / "base"
    for kind in ("/v1/chat/completions", "/v1/completions"):
        out = tmp_path / "out.json"
        options = {
            "--backend": f"kind=openai_http,target={address},model=math,request_format={kind}",
            "--profile": "kind=concurrent,streams=4",
            "--constraint": "kind=max_requests,count=12",
            "--data": "kind=synthetic_text,prompt_tokens=32,output_tokens=8",
            "--tokenizer": f"kind=huggingface_auto,model={base}",
            "--output": f"kind=json,path={out}",
        }
        run(guidellm, "run", *(part for pair in options.items() for part in pair), folder=tmp_path)
        (benchmark,) = json.loads(out.read_text(encoding="utf-8"))["benchmarks"]
        totals = benchmark["metrics"]["request_totals"]
        assert (totals["successful"], totals["errored"], totals["incomplete"]) == (12, 0, 0)
        spoken = benchmark["metrics"]["output_token_count"]["successful"]
        assert spoken["min"] == spoken["max"] == 8, "ignore_eos and max_tokens hold"
        assert benchmark["metrics"]["time_to_first_token_ms"]["successful"]["mean"] > 0


def test_lm_eval(address: str, embedded_family: Path, tmp_path: Path) -> None:
    lm_eval = program("lm_eval", "HELIOSTAT_LM_EVAL")
    prompts = [f"{a} + {b} =" for a in range(3) for b in range(4)]
    llm = LLM(embedded_family, members=["plan"], dtype="float32", cache_mib=16)
    answers = llm.generate(prompts, member="plan", max_tokens=8, stop=("|",))
    told = [{"prompt": p, "said": a.text} for p, a in zip(prompts, answers, strict=True)]
    told[0]["said"] += " or not"  # so that all right means something
    data = tmp_path / "adding.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in told), encoding="utf-8")
    (tmp_path / "adding.yaml").write_text(TASK.replace("FILE", str(data)), encoding="utf-8")
    where = f"model=plan,base_url={address}/v1/chat/completions,num_concurrent=3,max_retries=1"
    options = ["--model", "local-chat-completions", "--model_args", where, "--tasks", "adding"]
    more: list[str | Path] = [
        "--include_path",
        tmp_path,
        "--apply_chat_template",
        "--output_path",
        tmp_path / "out",
    ]
    run(lm_eval, "run", *options, *more, folder=tmp_path)
    (result,) = (tmp_path / "out").rglob("results*.json")
    score = json.loads(result.read_text(encoding="utf-8"))["results"]["adding"]["exact_match,none"]
    assert score == pytest.approx(11 / 12), "what is said over HTTP is what is said offline"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"logprobs": 1}, {"stop": [" "]}, {"max_tokens": 1}])
def test_a_client_that_takes_the_first_choice_of_every_chunk(
    address: str, path: str, fields: dict[str, Any]
) -> None:
    asked = (
        {"messages": [{"role": "user", "content": "2 + 3 ="}]} if "chat" in path else {"prompt": "2 + 3 ="}
    )
    body = {"model": "code", "max_tokens": 12, "stream": True, **asked, **fields}
    if "chat" in path and "logprobs" in fields:
        body |= {"logprobs": True, "top_logprobs": 1}
    texts: dict[int, str] = {}
    ended = set()
    with httpx2.stream("POST", address + path, json=body) as reply:
        for line in reply.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            choice = json.loads(line.removeprefix("data: "))["choices"][0]
            said = choice["delta"].get("content") if "chat" in path else choice["text"]
            assert said or choice["finish_reason"], "no chunk says nothing"
            texts[choice["index"]] = texts.get(choice["index"], "") + (said or "")
            ended |= {choice["index"]} if choice["finish_reason"] else set()
    assert ended == set(range(fields.get("n", 1))) == set(texts)


def test_schemathesis(tiny_family_made: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("schemathesis") is None:
        pytest.skip("no schemathesis here: pip install schemathesis")
    options = ["--checks", "not_a_server_error", "--max-examples", "15", "--seed", "1", "--max-failures", "3"]
    phases = ["--phases", "examples,coverage,fuzzing", "--suppress-health-check", "all"]
    with served(tiny_family_made, "--cache-mib", "16", "--max-length", "48") as (address, _):
        schema = f"{address}/openapi.json"
        run(Path(sys.executable).parent / "schemathesis", "run", schema, *options, *phases, folder=tmp_path)
        assert httpx2.get(f"{address}/health").status_code == 200
