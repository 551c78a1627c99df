"""From a name to who drafts: a module of the family, or the look-up, with the judges that its rules need."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from heliostat.build import Loaded, load_modules, module_folder, verify_module
from heliostat.engine.speculation.speculator import Drafting
from heliostat.engine.speculation.wanted import NGRAM, Wanted
from heliostat.errors import Refused
from heliostat.family import Family
from heliostat.model.config import read_config
from heliostat.model.judge import Judge, judge_name, read_judge
from heliostat.model.tokenizer import Tokenizer
from heliostat.model.transformer import Transformer

NOT_TEXT = "chat template"
"""The part of a tokenizer that changes no ids of a text."""


def drafting_of(
    wanted: Wanted,
    folder: Path,
    family: Family,
    speakers: Collection[str],
    *,
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    device: str = "cpu",
    models: Mapping[str, Transformer] | None = None,
    there: Mapping[str, Loaded] | None = None,
) -> Drafting | None:
    """Who drafts, loaded; ``speakers`` by the family's names; what is in memory already: modules (``there``) or their
    weights (``models``), by the family's names.

    Refused, before anything is loaded, for a module with another tokenizer and for a judge of others.
    """
    if wanted.draft is None:
        return None
    drafting = Drafting(ahead=wanted.ahead, adaptive=wanted.adaptive)
    name, digest = wanted.module, NGRAM
    if name is not None:
        verify_module(folder, family, name)
        refuse_other_tokens(folder, family, name, tokenizer)
        digest = family.module(name).digest
    judges = _judges(wanted, folder, family, speakers, digest)
    if name is None:
        return replace(drafting, judges=judges)
    there = there or {}
    models = models or {module.weights: module.model for module in there.values()}
    module = there.get(name)
    if module is None:
        module = load_modules(
            folder, family, [name], dtype=dtype, device=device, verify=False, models=models, joined=True
        )[name]
    return replace(drafting, module=module, reads=reads_pages(family, name), judges=judges)


def reads_pages(family: Family, draft: str) -> bool:
    """Whether a module that drafts reads the speaker's pages: it is one in codebooks, of the speaker's own shape."""
    return family.module(family.module(draft).weights).quantization is not None


def refuse_other_tokens(folder: Path, family: Family, draft: str, tokenizer: Tokenizer) -> None:
    """Raise Refused for a draft whose token ids mean something else than the family's."""
    path = module_folder(folder, family.module(family.module(draft).weights))
    size = read_config(path).vocabulary
    if size < tokenizer.size:
        raise Refused(
            f"draft {draft!r} knows {size} tokens, the family's tokenizer has {tokenizer.size}: a draft needs the same "
            "tokenizer; take another module, or draft with ngram"
        )
    if not (path / "tokenizer.json").is_file():
        return
    other = Tokenizer.load(path)
    apart = [
        part for part in tokenizer.parts if other.parts[part] != tokenizer.parts[part] and part != NOT_TEXT
    ]
    if apart:
        raise Refused(
            f"draft {draft!r} has another tokenizer than the family ({', '.join(apart)} differ): its tokens would be "
            "others than the speaker's; take a module with the same tokenizer, or draft with ngram"
        )


def _judges(
    wanted: Wanted, folder: Path, family: Family, speakers: Collection[str], draft: str
) -> dict[str, Judge]:
    """By the speaker's digest. One that was made for others is refused; of several speakers one may have none."""
    if not any(rule.kind == "judged" for rule in wanted.rules):
        return {}
    assert wanted.draft is not None
    found: dict[str, Judge] = {}
    refused: list[Refused] = []
    for speaker in dict.fromkeys(speakers):
        try:
            judge = read_judge(folder, wanted.judge or judge_name(speaker, wanted.draft))
            judge.check(family.module(speaker).digest, draft, folder=folder)
            found[judge.speaker] = judge
        except Refused as error:
            refused.append(error)
    if not found:
        raise refused[0]
    return found
