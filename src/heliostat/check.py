"""Is this family what it says: digests, training and serving agree, and what a member would lose under another row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from heliostat.build import (
    Loaded,
    load_modules,
    load_tokenizer,
    modules_of,
    read_family,
    refuse_broken,
    verify_files,
    verify_member,
)
from heliostat.errors import Refused
from heliostat.family import SHARINGS, Family, Row, choose
from heliostat.llm import LLM
from heliostat.model.tokenizer import Tokenizer
from heliostat.train.data import Example, answered_by, read_examples
from heliostat.train.evaluate import evaluate
from heliostat.train.sharing import lay_out, log_probabilities, speak

PROBES = ("wake me at seven", "what is 12 plus 30?", "say the words backwards: one two three", "hello")
AGREE = 2e-3
"""Largest difference (nats a token, float32) between training's and serving's log-probabilities that is rounding."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked."""

    name: str
    ok: bool
    text: str


def check_family(
    folder: str | Path,
    *,
    members: Sequence[str] | None = None,
    sharing: str | None = None,
    data: str | Path | None = None,
    metric: str | None = None,
) -> Iterator[Finding]:
    """Check a family, finding by finding. ``sharing``: also say what each member would lose under it, untrained.

    Every byte of every module is read again. Raises Refused only for what makes a family unreadable.
    """
    folder = Path(folder)
    family = read_family(folder)
    names = list(members) if members else list(family.members)
    for name in names:
        family.member(name)
    if sharing is not None:
        choose(sharing, SHARINGS, what="sharing")
    files, strangers = list(_modules(folder, family)), list(_strangers(folder, family))
    yield from (*files, *strangers)
    names = [name for name in names if f"member {name}" not in {finding.name for finding in strangers}]
    if not all(finding.ok for finding in files):
        if names:
            yield Finding("members", False, f"not tried ({', '.join(names)}): mend what is above first")
        return
    try:
        tokenizer = load_tokenizer(folder, family)
    except Refused as error:
        yield Finding("tokenizer", False, str(error))
        return
    yield Finding("tokenizer", True, f"digest {tokenizer.digest[:12]}")
    for name in names:
        modules = load_modules(folder, family, modules_of(family, [name]), dtype=torch.float32, verify=False)
        yield _agreement(family, name, modules, tokenizer)
        if sharing is not None:
            yield from _as_other(folder, family, name, sharing, tokenizer, data=data, metric=metric)


def _modules(folder: Path, family: Family) -> Iterator[Finding]:
    """Every module, by its files."""
    for name, module in family.modules.items():
        try:
            verify_files(folder, family, name, fresh=True)
            refuse_broken(folder, module)
            coded = f" in codebooks ({module.quantization})" if module.quantization is not None else ""
            if coded:  # a format that its tensors do not follow is found only by who puts them together
                load_modules(folder, family, [name], dtype=torch.float32, verify=False)
            text = f"{module.parameters:,} parameters{coded}, digest {module.digest[:12]}"
            yield Finding(f"module {name}", True, text)
        except Refused as error:
            yield Finding(f"module {name}", False, str(error))


def _strangers(folder: Path, family: Family) -> Iterator[Finding]:
    """Members that were tuned with other weights than their rows name now."""
    for name in family.members:
        try:
            verify_member(family, name, folder=folder)
        except Refused as error:
            yield Finding(f"member {name}", False, str(error))


def _agreement(family: Family, member: str, modules: dict[str, Loaded], tokenizer: Tokenizer) -> Finding:
    """The member answers some prompts; training's pass over those answers must give the probabilities serving gave."""
    row = family.row(member)
    llm = LLM.of(modules, {member: row}, tokenizer)
    longest = max(2, min(24, llm.engine.max_length // 4))
    answers = llm.generate(list(PROBES), member=member, max_tokens=longest, logprobs=0)
    worst, count = 0.0, 0
    for prompt, answer in zip(PROBES, answers, strict=True):
        trained = spoken_log_probabilities(answered_by(llm.prompt_ids(prompt), answer.ids), row, modules)
        gaps = [abs(a - b) for a, b in zip(trained, answer.logprobs, strict=True)]
        worst, count = max([worst, *gaps]), count + len(gaps)
    text = f"training and serving differ by at most {worst:.1e} nats over {count} answer tokens (float32)"
    return Finding(f"member {member}", worst <= AGREE, text)


@torch.no_grad()
def spoken_log_probabilities(example: Example, row: Row, modules: dict[str, Loaded]) -> list[float]:
    """Log-probability (nats) that training gives each answer token of an example under a row, in order of position."""
    layout = lay_out([example], row)
    spoken = log_probabilities(speak(layout, row, modules), layout.targets)
    return spoken[layout.where[:, 1].argsort()].tolist()


def _as_other(
    folder: Path,
    family: Family,
    member: str,
    sharing: str,
    tokenizer: Tokenizer,
    *,
    data: str | Path | None,
    metric: str | None,
) -> Iterator[Finding]:
    """What the member's own module does in the row of another sharing, as it is."""
    own = [name for name in family.row(member).modules if name != "base"]
    own = [name for name in own if family.module(name).quantization is None]
    if len(own) != 1:
        yield Finding(f"{member} as {sharing}", False, f"it has {len(own)} modules of its own; one is needed")
        return
    other = SHARINGS[sharing].instantiate(own[0])
    if other == family.row(member):
        yield Finding(f"{member} as {sharing}", True, "skipped, it has that sharing already")
        return
    names = list(dict.fromkeys([*family.row(member).modules, *other.modules]))
    modules = load_modules(folder, family, names, dtype=torch.float32, verify=False)
    rows = {member: family.row(member), f"{member} as {sharing}": other}
    llm = LLM.of(modules, rows, tokenizer)
    examples = _examples(llm, member, tokenizer, data)
    before, after = (_mean_loss(examples, row, modules) for row in rows.values())
    text = f"without retraining, loss {before:.3f} -> {after:.3f} nats an answer token"
    if data is not None and metric is not None:
        scores = [evaluate(llm, name, data, metric=metric, limit=500).accuracy for name in rows]
        text += f", accuracy {scores[0]:.1%} -> {scores[1]:.1%} ({metric})"
    else:
        text += f" on {len(examples)} of its own answers; give --data for a real set"
    lost = after - before > 0.05
    yield Finding(f"{member} as {sharing}", True, text + ("; train it for this row instead" if lost else ""))


def _examples(llm: LLM, member: str, tokenizer: Tokenizer, data: str | Path | None) -> list[Example]:
    if data is not None:
        return list(
            read_examples(data, tokenizer, max_length=llm.engine.max_length, too_long="skip").examples[:256]
        )
    answers = llm.generate(
        list(PROBES), member=member, max_tokens=max(2, min(24, llm.engine.max_length // 4))
    )
    return [answered_by(llm.prompt_ids(p), a.ids) for p, a in zip(PROBES, answers, strict=True)]


def _mean_loss(examples: Sequence[Example], row: Row, modules: dict[str, Loaded]) -> float:
    chances = [c for example in examples for c in spoken_log_probabilities(example, row, modules)]
    return -sum(chances) / len(chances)
