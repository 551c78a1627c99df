"""A vLLM worker without a server, as a program: started by the words of ``launch.command``, asked by lines of JSON.

For tests and measurements; runs in an environment with vLLM. A line on standard input is a list of requests, which run
as one crowd; the line that answers begins with ``ANSWERS`` (vLLM writes to standard output, too).
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import fields
from typing import Any

from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.lora.request import LoRARequest
from vllm.utils.argparse_utils import FlexibleArgumentParser


def main() -> None:
    """Answer until standard input ends."""
    words = sys.argv[sys.argv.index("serve") + 1 :]
    given = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    given.model = given.model_tag
    arguments = EngineArgs.from_cli_args(given)
    names = [field.name for field in fields(EngineArgs) if hasattr(given, field.name)]
    llm = LLM(**{name: getattr(arguments, name) for name in names})
    adapters = {
        module.name: LoRARequest(module.name, number, module.path)
        for number, module in enumerate(given.lora_modules or (), start=1)
    }
    print("READY", flush=True)
    for line in sys.stdin:
        asked, began = json.loads(line), time.perf_counter()
        done = answers(llm, adapters, asked)
        print("ANSWERS " + json.dumps({"seconds": time.perf_counter() - began, "answers": done}), flush=True)
    llm.llm_engine.engine_core.shutdown()
    os._exit(0)  # what is left of vLLM takes half a minute to end by itself


def answers(llm: LLM, adapters: dict[str, LoRARequest], asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tokens, why they end, what is said of keys and values, and how many prompt tokens were found again."""
    prompts, wishes = [], []
    for one in asked:
        salt = {"cache_salt": one["cache_salt"]} if one.get("cache_salt") else {}
        prompts.append({"prompt_token_ids": one["prompt"], **salt})
        extra = {"kv_transfer_params": one["kv_transfer_params"]} if one.get("kv_transfer_params") else None
        wishes.append(
            SamplingParams(temperature=0, max_tokens=one["max_tokens"], ignore_eos=True, extra_args=extra)
        )
    chosen = [adapters.get(one["model"]) for one in asked]
    done = llm.generate(prompts, wishes, lora_request=chosen, use_tqdm=False)
    return [
        {
            "tokens": list(one.outputs[0].token_ids),
            "finish": one.outputs[0].finish_reason,
            "params": one.kv_transfer_params,
            "cached": one.num_cached_tokens,
        }
        for one in done
    ]


if __name__ == "__main__":
    main()
