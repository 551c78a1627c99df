"""The model card of an exported member: what it is, who plays which part, how to run it, under which licence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heliostat.family import SHARINGS, Family
from heliostat.model.attention_kind import IN_WORDS, PREFIX


def licence_of(base: Path) -> str | None:
    """The licence that the base's card declares, if it has one."""
    readme = base / "README.md"
    if not readme.is_file():
        return None
    found = re.search(
        r"^license:\s*(\S+)\s*$", readme.read_text(encoding="utf-8", errors="replace"), re.MULTILINE
    )
    return found[1] if found else None


def card(family: Family, member: str, facts: Mapping[str, Any], licence: str | None) -> str:
    """The model card (README.md) of an exported member."""
    row, sharing = facts["row"], family.member(member).sharing
    head = [
        "---",
        f"library_name: {'transformers' if facts.get('attention') is None else 'heliostat'}",
        *([f"license: {licence}"] if licence else []),
        "tags: [heliostat]",
        "---",
    ]
    shared = SHARINGS[sharing].shared if sharing in SHARINGS else "as its row says"
    table = "\n".join(
        f"| {part} | {'this folder' if who == 'own' else 'the base'} |" for part, who in row.items()
    )
    evaluation = (
        "\n".join(f"- {name}: {value}" for name, value in facts["evaluation"].items()) or "- none recorded"
    )
    licence_line = (
        f"The base's licence ({licence}) applies."
        if licence
        else "The base's licence applies; its files lie beside this card where it has any."
    )
    return "\n".join(
        [
            *head,
            f"# {member}",
            "",
            f"A member of a heliostat family, sharing `{sharing}` (shared when serving: {shared}). {_standing(facts)}",
            "",
            "| part | played by |",
            "|---|---|",
            table,
            "",
            *_base_line(facts),
            "## Run it",
            "",
            f'With heliostat: `heliostat generate FAMILY --member {member} --dtype float32 --prompt "..."`.',
            "",
            _without_heliostat(facts),
            "",
            *_same_answers(facts),
            "## Evaluation",
            "",
            evaluation,
            "",
            "## Licence",
            "",
            licence_line,
            "",
        ]
    )


def _same_answers(facts: Mapping[str, Any]) -> list[str]:
    """When the script's answers are heliostat's, where there is a script."""
    if facts.get("attention") is not None:
        return []
    return [
        "Greedy answers are the same in the same number format; left out, heliostat's `--dtype` is bfloat16 where",
        "the hardware multiplies it, the script's is float32.",
        "",
    ]


def _base_line(facts: Mapping[str, Any]) -> list[str]:
    """Which base it needs, where it needs one."""
    if facts["alone"]:
        return []
    digest = facts["digests"]["base"]
    if "dequantized" in facts:
        return [
            f"Base: the folder `base` here, which is what a quantized module stands for ({facts['dequantized']}). The model "
            "that module was made of gives other answers.",
            "",
        ]
    return [
        f"Base: SHA-256 digest `{digest}` over tensors and configuration. Another base gives other answers.",
        "",
    ]


def _without_heliostat(facts: Mapping[str, Any]) -> str:
    """How to answer with transformers alone, where it can."""
    if (attention := facts.get("attention")) is not None:
        return (
            f"Only heliostat runs it: its attention is `{attention['kind']}`, which neither transformers nor vLLM has "
            f"({IN_WORDS[attention['kind']]}). Its `model_type` begins with `{PREFIX}`, so that both refuse it by name "
            "instead of answering as another model."
        )
    if facts["alone"]:
        return 'With transformers: `python reproduce.py --prompt "..."`, or `from_pretrained` this folder.'
    return 'With two models in transformers: `python reproduce.py --base PATH_OF_THE_BASE --prompt "..."`.'


def _standing(facts: Mapping[str, Any]) -> str:
    """Whether what is exported answers by itself."""
    if facts["alone"]:
        return "A whole model: it answers by itself."
    if row_is_own(facts["row"]):
        return "An adapter: it answers on the base's weights."
    return (
        "**Half a member.** Run alone, these weights do not answer as the member does: "
        "the base plays the other parts of its row."
    )


def row_is_own(row: Mapping[str, str]) -> bool:
    """Whether one's own module plays every part."""
    return set(row.values()) == {"own"}
