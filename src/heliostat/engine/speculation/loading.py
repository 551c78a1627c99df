"""From a name to who drafts: a module of the family, or the look-up, with the judges that its rules need."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from heliostat.build import Loaded, load_modules, module_folder, verify_module
from heliostat.engine.speculation.rule import OFF, Rule, parse_rule
from heliostat.engine.speculation.speculator import AHEAD, NGRAM, Drafting
from heliostat.errors import Refused
from heliostat.family import Family
from heliostat.model.config import read_config
from heliostat.model.judge import Judge, judge_name, read_judge
from heliostat.model.tokenizer import Tokenizer
from heliostat.model.transformer import Transformer


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to be drafted, as an operator says it. Raises Refused for a rule that there is not, or without a draft."""

    draft: str | None = None
    """A module of the family, or ``ngram``; None: nothing is drafted."""
    verify: Sequence[str] = ()
    """Rules: the first for requests that do not say, all of them for those that do; ``lossless`` is always one."""
    judge: str | None = None
    """Name of the judge; None: the one made for speaker and draft."""
    ahead: int = AHEAD
    adaptive: bool = True

    def __post_init__(self) -> None:
        if self.draft is None and (self.verify or self.judge):
            raise Refused(
                "there is a rule to verify by, and nothing is drafted: say --draft, a module or ngram"
            )
        kinds = {rule.kind for rule in self.rules}
        if self.draft == NGRAM and "kl" in kinds:
            raise Refused(
                f"kl compares distributions, and the draft {NGRAM!r} has none: draft with a module, or take another rule"
            )
        if self.judge is not None and "judged" not in kinds:
            raise Refused(f"judge {self.judge!r} would judge nothing: add --verify judged")

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Those that requests may ask for, the one for those that do not ask first."""
        return tuple(map(parse_rule, self.verify)) or (Rule(),)

    @property
    def module(self) -> str | None:
        """The module that drafts, by the family's name."""
        return None if self.draft in (None, NGRAM) else self.draft

    def rule(self, asked: str | None) -> Rule | None:
        """The rule for a request that says this; None: nothing is drafted for it. Refused where it may not have it."""
        if asked == OFF or (asked is None and self.draft is None):
            return None
        rule = self.rules[0] if asked is None else parse_rule(asked)
        if self.draft is None:
            raise Refused(
                f"speculation {asked!r}: nothing is drafted here; leave it out, or start with --draft"
            )
        if not rule.lossless and rule not in self.rules:
            there = ", ".join(dict.fromkeys(["lossless", *map(str, self.rules), OFF]))
            raise Refused(
                f"speculation {asked!r} is not allowed here, it could change answers; allowed is: {there} (who serves "
                f"may add --verify {asked})"
            )
        return rule


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
    """Who drafts, loaded; ``speakers`` by the family's names; ``models`` and ``there``: what is in memory already.

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
    module = (there or {}).get(name)
    if module is None:
        module = load_modules(
            folder, family, [name], dtype=dtype, device=device, verify=False, models=models, joined=True
        )[name]
    reads = family.module(family.module(name).weights).quantization is not None
    return replace(drafting, module=module, reads=reads, judges=judges)


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
    if apart := [part for part in tokenizer.parts if other.parts[part] != tokenizer.parts[part]]:
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
