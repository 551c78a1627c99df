"""Answers as this member does, with two models in transformers and nothing of heliostat: python reproduce.py --help

The row in heliostat.json says who plays each part. With n prompt tokens, positions below the boundary b are written
by prompt_writer, the others by answer_writer, and speaker's logits choose each next token there. b = n where the
first speaker is the prompt_writer, else n - 1.
"""

import argparse
import json
import pathlib

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

HERE = pathlib.Path(__file__).resolve().parent


class Borrowed:
    """The cache that another module wrote, for a module that only reads it: what the reader would write is dropped."""

    def __init__(self, cache):
        self.cache, self.layers = cache, cache.layers
        self.is_compileable = False

    def __getattr__(self, name):
        return getattr(self.cache, name)

    def update(self, keys, values, layer, *args, **kwargs):
        return self.layers[layer].keys, self.layers[layer].values

    def get_seq_length(self, layer=0):
        return self.cache.get_seq_length(layer) - 1

    def get_mask_sizes(self, query_length, layer=0):
        return self.cache.get_seq_length(layer), 0


def load_own(base, dtype):
    """The half in this folder: a whole checkpoint, or an adapter on the base."""
    if (HERE / "adapter_config.json").exists():
        from peft import PeftModel

        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), HERE).eval()
    return AutoModelForCausalLM.from_pretrained(HERE, dtype=dtype).eval()


@torch.no_grad()
def answer(row, models, prompt, *, max_tokens, eos):
    """Greedy answer (token ids) to prompt (token ids)."""
    tokens, cache = list(prompt), DynamicCache()
    boundary = len(prompt) if row["first_speaker"] == row["prompt_writer"] else len(prompt) - 1
    if boundary:
        out = models[row["prompt_writer"]](
            torch.tensor([tokens[:boundary]]), past_key_values=cache, use_cache=True
        )
        if boundary == len(prompt):
            tokens.append(int(out.logits[0, -1].argmax()))
    while len(tokens) - len(prompt) < max_tokens and not (len(tokens) > len(prompt) and tokens[-1] in eos):
        last = {"input_ids": torch.tensor([tokens[-1:]]), "position_ids": torch.tensor([[len(tokens) - 1]])}
        out = models[row["answer_writer"]](**last, past_key_values=cache, use_cache=True)
        if row["speaker"] != row["answer_writer"]:
            out = models[row["speaker"]](**last, past_key_values=Borrowed(cache), use_cache=True)
        tokens.append(int(out.logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def main():
    """Read the arguments, load the two models, print the answer."""
    facts = json.loads((HERE / "heliostat.json").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--base", required=not facts["alone"], help="folder of the base checkpoint this member was tuned from"
    )
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument(
        "--dtype", default="float32", help="float32 or bfloat16: compare answers in the same one"
    )
    parser.add_argument("--json", action="store_true", help="print token ids and text as JSON")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    models = {"own": load_own(args.base, dtype)}
    if "base" in facts["row"].values():
        models["base"] = AutoModelForCausalLM.from_pretrained(args.base, dtype=dtype).eval()
    adapter = (HERE / "adapter_config.json").exists()
    # Not AutoTokenizer: some of its classes rebuild rules that tokenizer.json has already.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.base if adapter else HERE)
    text = args.prompt
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        prompt = facts["prompt_prefix"] + tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = answer(facts["row"], models, prompt, max_tokens=args.max_tokens, eos=set(facts["eos_ids"]))
    shown = tokenizer.decode(ids, skip_special_tokens=True)
    print(json.dumps({"prompt_ids": prompt, "ids": ids, "text": shown}) if args.json else shown)


if __name__ == "__main__":
    main()
