"""``heliostat generate``: one prompt, streamed to the terminal, or a file of prompts in one batch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heliostat.cli.options import given, sampling_options, taking
from heliostat.cli.printing import Family, Json, print_json
from heliostat.engine.request import Sampling
from heliostat.errors import Refused
from heliostat.files import read_json

if TYPE_CHECKING:
    from heliostat.llm import Answer, Prompt
    from heliostat.train.formats import Record

Member = Annotated[str, typer.Option(help="Who answers: a member, or a module alone.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, or auto: what this machine is fast at.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto: cuda where there is one, else cpu.")]
CacheMib = Annotated[int, typer.Option(min=1, help="Most memory for keys and values, in MiB.")]


@taking(sampling_options())
def generate(
    family: Family,
    member: Member = "base",
    prompt: Annotated[str | None, typer.Option(help="One prompt.", show_default=False)] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="jsonl with a prompt a line; the answers come as jsonl, too.", show_default=False),
    ] = None,
    schema: Annotated[
        Path | None,
        typer.Option(help="A JSON schema in a file: the answers are JSON that fits it.", show_default=False),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    cache_mib: CacheMib = 1024,
    as_json: Json = False,
    **flags: Any,
) -> None:
    """Greedy unless --temperature is given."""
    if (prompt is None) == (prompt_file is None):
        raise Refused("give one of --prompt TEXT and --prompt-file FILE.jsonl")
    wish: dict[str, Any] = {"member": member, "sampling": sampling_of(given(flags))}
    wish["schema"] = None if schema is None else read_json(schema)
    records = _prompts_in(prompt_file) if prompt_file is not None else ()
    from heliostat.build import device_named
    from heliostat.llm import LLM

    llm = LLM(family, members=[member], dtype=dtype, device=device_named(device), cache_mib=cache_mib)
    if prompt is None:
        answers = llm.generate([_asked(r, llm.tokenizer.has_template) for r in records], **wish)
        for record, answer in zip(records, answers, strict=True):
            print(json.dumps({"line": record.line, **_facts(answer)}, ensure_ascii=False))
    elif as_json:
        (answer,) = llm.generate(prompt, **wish)
        print_json({"prompt": prompt, **_facts(answer)})
    else:
        for piece in llm.stream(prompt, **wish):
            print(piece, end="", flush=True)
        print()


def sampling_of(flags: Mapping[str, Any]) -> Sampling:
    """Sampling from the options that were typed."""
    values = dict(flags)
    if "stop" in values:
        values["stop"] = tuple(values["stop"])
    if "logit_bias" in values:
        values["logit_bias"] = dict(_bias(text) for text in values["logit_bias"])
    return Sampling(**values)


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError as error:
        raise Refused(f"--logit-bias is {text!r}; it must be TOKEN=BIAS, for instance 12=-100") from error


def _prompts_in(path: Path) -> tuple[Record, ...]:
    from heliostat.train.formats import read_jsonl

    return read_jsonl(path, prompts=True).records


def _asked(record: Record, has_template: bool) -> Prompt:
    """A prompt as the engine takes it: a bare text stays one where there is no template."""
    if record.plain and not has_template:
        return record.turns[0].content
    return [turn.message for turn in record.turns]


def _facts(answer: Answer) -> dict[str, Any]:
    facts = asdict(answer)
    return {
        "member": facts["member"],
        "answer": facts["text"],
        "finish_reason": facts["finish_reason"],
        "prompt_tokens": facts["prompt_tokens"],
        "cached_tokens": facts["cached_tokens"],
        "answer_tokens": len(facts["ids"]),
        **({"logprobs": list(facts["logprobs"])} if facts["logprobs"] else {}),
    }
