"""One engine answers fresh prompts and says how long it took, as JSON. Stands alone: a peer's Python need not know us.

``python -P peer.py '{"engine": ..., "folder": ..., ...}'``: see ``Spec``. Peers are imported where they are needed.
"""

import dataclasses
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

Prompts = Sequence[Sequence[int]]
Answer = Callable[[Prompts, int], list[float]]
"""Answers prompts with so many tokens each, greedily, whatever they are; says when each step was done."""
SPARE = 6
"""Steps at either end of an answer that do not count: while prompts are read in turns, not all requests speak."""


@dataclasses.dataclass
class Spec:
    """What to measure."""

    engine: str
    """A name of ENGINES."""
    folder: str
    """An ordinary checkpoint in bfloat16."""
    threads: int
    seed: int
    batches: list[int]
    prompt: int
    """Tokens of a prompt, for decoding."""
    steps: int
    """Tokens of an answer whose time counts, for decoding."""
    lengths: list[int]
    """Tokens of single prompts, for reading them."""
    most: int
    """Tokens of the longest text."""


def heliostat(spec: Spec) -> tuple[Answer, str]:
    import torch

    from heliostat.bench.decode import ours

    engine = ours(spec.folder, most=spec.most)
    return engine.answer, f"{str(engine.model.dtype).removeprefix('torch.')}, torch {torch.__version__}"


def transformers(spec: Spec) -> tuple[Answer, str]:
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteriaList, __version__

    model: Any = AutoModelForCausalLM.from_pretrained(spec.folder, dtype=torch.bfloat16).eval()

    def answer(prompts: Prompts, count: int) -> list[float]:
        ids, marks = torch.tensor(prompts), list[float]()

        def mark(said: Any, scores: Any, **_: Any) -> Any:
            marks.append(time.perf_counter())
            return torch.zeros(len(said), dtype=torch.bool)

        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([mark]),
        )
        assert out.shape[1] == ids.shape[1] + count
        return marks

    return answer, f"{__version__}, bfloat16"


def vllm(spec: Spec) -> tuple[Answer, str]:
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{spec.threads - 1}",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    import vllm as them

    model = them.LLM(
        spec.folder,
        dtype="bfloat16",
        max_model_len=spec.most,
        max_num_seqs=max(spec.batches),
        max_num_batched_tokens=2048,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        enforce_eager=True,
        block_size=32,
    )

    core = model.llm_engine

    def answer(prompts: Prompts, count: int) -> list[float]:
        wish = them.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        for number, prompt in enumerate(prompts):
            core.add_request(str(number), {"prompt_token_ids": list(prompt)}, wish)
        marks, said = [], 0
        while core.has_unfinished_requests():
            done = core.step()
            marks.append(time.perf_counter())
            said += sum(len(each.outputs[0].token_ids) for each in done if each.finished)
        assert said == count * len(prompts)
        return marks

    return answer, f"{them.__version__}, bfloat16, eager"


def openvino(spec: Spec) -> tuple[Answer, str]:
    import numpy as np
    import openvino as ov
    import openvino_genai as them

    plan = them.SchedulerConfig()
    plan.cache_size, plan.enable_prefix_caching, plan.max_num_batched_tokens = 1, False, 2048
    options = {
        "INFERENCE_NUM_THREADS": spec.threads,
        "INFERENCE_PRECISION_HINT": "bf16",
        "KV_CACHE_PRECISION": "bf16",
    }
    pipeline = them.ContinuousBatchingPipeline(gguf_of(spec.folder), plan, "CPU", options)

    def answer(prompts: Prompts, count: int) -> list[float]:
        wish = them.GenerationConfig()
        wish.max_new_tokens = wish.min_new_tokens = count
        wish.ignore_eos, wish.do_sample = True, False
        made = [np.array([prompt], dtype=np.int64) for prompt in prompts]
        handles = [pipeline.add_request(n, ov.Tensor(ids), wish) for n, ids in enumerate(made)]
        marks = []
        while pipeline.has_non_finished_requests():
            pipeline.step()
            marks.append(time.perf_counter())
        assert all(len(each.read_all()[0].generated_ids) == count for each in handles)
        return marks

    version = ov.__version__.partition("-")[0]
    return answer, f"{version}, weights float16, computes and caches in bfloat16"


def gguf_of(folder: str) -> str:
    """The checkpoint as a GGUF file, which OpenVINO GenAI reads as it is; made once. Numbers of bfloat16 become float16."""
    import gguf
    import numpy as np

    path = os.path.join(folder, "model.gguf")
    if os.path.exists(path):
        return path
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    made = gguf.GGUFWriter(path + ".new", "llama")
    made.add_context_length(config["max_position_embeddings"])
    made.add_embedding_length(config["hidden_size"])
    made.add_block_count(config["num_hidden_layers"])
    made.add_feed_forward_length(config["intermediate_size"])
    made.add_head_count(heads["q_proj"])
    made.add_head_count_kv(heads["k_proj"])
    made.add_layer_norm_rms_eps(config["rms_norm_eps"])
    made.add_rope_dimension_count(config["hidden_size"] // heads["q_proj"])
    made.add_rope_freq_base(10_000.0)
    made.add_vocab_size(config["vocab_size"])
    made.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    _add_tokens(made, config["vocab_size"])
    for name, numbers in _tensors(os.path.join(folder, "model.safetensors")):
        kind = name.split(".")[-2]
        if kind in heads:  # the other order of a head's numbers: pairs that turn together lie side by side
            turned = numbers.reshape(heads[kind], 2, -1, numbers.shape[1]).swapaxes(1, 2)
            numbers = turned.reshape(numbers.shape)
        made.add_tensor(_gguf_name(name), numbers.astype(np.float16 if numbers.ndim == 2 else np.float32))
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()
    os.replace(path + ".new", path)
    return path


def _add_tokens(made: Any, count: int) -> None:
    """Some tokenizer: a reader wants one, and nobody asks it."""
    made.add_tokenizer_model("gpt2")
    made.add_tokenizer_pre("gpt-2")
    made.add_token_list(["<unk>", "<s>", "</s>", *(f"t{number}" for number in range(3, count))])
    made.add_token_types([3] * 3 + [1] * (count - 3))
    made.add_token_merges(["t 1"])
    made.add_bos_token_id(1)
    made.add_eos_token_id(2)


def _tensors(path: str) -> list[tuple[str, Any]]:
    """Names and float32 arrays of a safetensors file in bfloat16."""
    import numpy as np

    with open(path, "rb") as file:
        raw = file.read()
    start = 8 + int.from_bytes(raw[:8], "little")
    found = []
    for name, facts in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            begin, end = facts["data_offsets"]
            halves = np.frombuffer(raw, np.uint16, (end - begin) // 2, start + begin)
            wide = (halves.astype(np.uint32) << 16).view(np.float32)
            found.append((name, wide.reshape(facts["shape"])))
    return found


def _gguf_name(name: str) -> str:
    alone = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    name = name.removesuffix(".weight")
    if not name.startswith("model.layers."):
        return alone[name] + ".weight"
    layer, part = name.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{alone[part]}.weight"


ENGINES = {"heliostat": heliostat, "transformers": transformers, "vllm": vllm, "openvino": openvino}


def measure(answer: Answer, spec: Spec) -> dict[str, dict[str, float]]:
    """Median seconds between two tokens by batch; median seconds to the first token by length of the prompt."""
    fresh = random.Random(spec.seed)

    def asked(batch: int, length: int) -> list[list[int]]:
        return [[fresh.randrange(3, 1000) for _ in range(length)] for _ in range(batch)]

    def first(length: int) -> float:
        prompts = asked(1, length)
        begin = time.perf_counter()
        return answer(prompts, 1)[0] - begin

    answer(asked(2, spec.prompt), 4)
    decode = {}
    for batch in spec.batches:
        marks = answer(asked(batch, spec.prompt), spec.steps + 2 * SPARE + 1)
        between = [later - mark for mark, later in itertools.pairwise(marks)]
        decode[str(batch)] = statistics.median(between[SPARE:-SPARE])
    prefill = {str(length): statistics.median(first(length) for _ in range(3)) for length in spec.lengths}
    return {"decode": decode, "prefill": prefill}


def main() -> None:
    spec = Spec(**json.loads(sys.argv[1]))
    answer, what = ENGINES[spec.engine](spec)
    print(json.dumps({"what": what, **measure(answer, spec)}))


if __name__ == "__main__":
    main()
