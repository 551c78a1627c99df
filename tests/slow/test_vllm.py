"""What vLLM reads of ours, in an environment of its own (``make vllm-env``): tuned columns as the LoRA they are saved as."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from heliostat.bench.trial import EMBEDDED_BASE
from heliostat.linear import paca

pytestmark = pytest.mark.slow

ANSWERS = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

base, adapter, asked = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
llm = LLM(base, dtype="float32", max_model_len=256, max_num_seqs=4, enforce_eager=True, block_size=32,
          enable_lora=True, max_lora_rank=16)
wish = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
done = llm.generate([{"prompt_token_ids": ids} for ids in asked], wish, lora_request=LoRARequest("m", 1, adapter))
print("ANSWERS " + json.dumps([list(one.outputs[0].token_ids) for one in done]))
"""


def made(folder: Path) -> LlamaForCausalLM:
    """A model of a shape that vLLM's attention on processors takes, in ``folder`` with a tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED_BASE).save_pretrained(folder)
    return model


@torch.no_grad()
def greedy(model: LlamaForCausalLM, prompts: list[list[int]], count: int = 12) -> list[list[int]]:
    answers = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        answers.append(ids[len(prompt) :])
    return answers


def test_vllm_answers_with_tuned_columns_as_we_do(tmp_path: Path) -> None:
    python = os.environ.get("HELIOSTAT_VLLM")
    if not python:
        pytest.skip("HELIOSTAT_VLLM names no Python of an environment with vLLM (make vllm-env)")
    model = made(tmp_path / "base")
    chance = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 2000, (n,), generator=chance).tolist() for n in (7, 16, 33, 64)]
    before = greedy(model, prompts)
    paca.apply(model, r=16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    wanted = greedy(model, prompts)
    assert wanted != before
    paca.save(model, tmp_path / "adapter")
    words = [
        python,
        "-c",
        ANSWERS,
        str(tmp_path / "base"),
        str(tmp_path / "adapter"),
        json.dumps(prompts),
    ]
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    run = subprocess.run(
        words, env={**os.environ, **settings}, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert json.loads(line.removeprefix("ANSWERS ")) == wanted
