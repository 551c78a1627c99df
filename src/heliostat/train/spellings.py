"""Recipes from YAML and plain values: our spelling, other tools' spellings, errors that say what would do."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from heliostat.errors import Refused
from heliostat.family import SHARINGS
from heliostat.files import read_yaml
from heliostat.train.recipe import Pace

P = TypeVar("P", bound=Pace)
Tell = Callable[[str], object]

SPELLINGS: Mapping[str, str] = {
    # axolotl
    "micro_batch_size": "per_device_train_batch_size",
    "sequence_len": "max_length",
    "num_epochs": "num_train_epochs",
    "base_model": "family",
    "adapter": "tuner",
    "lora_r": "r",
    "lora_target_modules": "target_modules",
    "lr_scheduler": "lr_scheduler_type",
    "sample_packing": "packing",
    # LLaMA-Factory
    "model_name_or_path": "family",
    "finetuning_type": "tuner",
    "lora_rank": "r",
    "lora_target": "target_modules",
    "cutoff_len": "max_length",
    "dataset": "data",
    "eval_dataset": "eval_data",
    # trl and transformers, earlier
    "max_seq_length": "max_length",
    "train_file": "data",
    "validation_file": "eval_data",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
}
"""Other tools' names of our arguments."""

_KINDS = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "a text (in YAML, put quotes around it)",
    "tuple_type": "a list",
    "too_short": "not empty",
    "string_too_short": "not empty",
}
"""What pydantic calls a wrong kind, in words that follow "it must be"."""


def make_recipe(
    kind: type[P], values: Mapping[str, Any], *, where: str = "recipe", tell: Tell | None = None
) -> P:
    """A recipe from values by name, e.g. of YAML and flags together.

    Other tools' names are taken, with a hint given to ``tell`` (default: stderr). Refused, all faults in one
    message: unknown names (with the nearest known one), missing ones, values of the wrong kind or out of
    range.
    """
    named = _in_our_words(kind, values, where=where, tell=tell or _to_stderr)
    try:
        return kind(**named)
    except ValidationError as error:
        raise Refused(f"{where}: {_explain(kind, error)}") from error


def read_values(path: str | Path) -> dict[str, Any]:
    """The values of a YAML recipe, unchecked; refused if it is no mapping of names to values."""
    return read_yaml(path, what="recipe: it should hold lines like `learning_rate: 1.0e-4`")


def read_recipe(kind: type[P], path: str | Path, *, tell: Tell | None = None) -> P:
    """The recipe in a YAML file; see make_recipe."""
    return make_recipe(kind, read_values(path), where=str(path), tell=tell)


def to_yaml(recipe: Pace) -> str:
    """The recipe as YAML that ``read_recipe`` reads back, what it is about before how it descends."""
    values = recipe.model_dump(mode="json")
    own = [name for name in values if name not in Pace.model_fields]
    ordered = {name: values[name] for name in [*own, *(n for n in values if n in Pace.model_fields)]}
    return yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True)


def changes(recipe: Pace, path: Path, *, ignored: Iterable[str] = ()) -> list[str]:
    """What ``recipe`` says otherwise than the YAML that ``to_yaml`` wrote to ``path``; nothing if that is unreadable."""
    try:
        before = read_values(path)
    except Refused:
        return []
    now = recipe.model_dump(mode="json")
    names = [n for n in sorted({*before, *now} - set(ignored)) if before.get(n) != now.get(n)]
    return [f"{name} was {before.get(name)!r}, is now {now.get(name)!r}" for name in names]


def _in_our_words(kind: type[Pace], values: Mapping[str, Any], *, where: str, tell: Tell) -> dict[str, Any]:
    named: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for word, value in values.items():
        name = word
        if word not in kind.model_fields and SPELLINGS.get(word) in kind.model_fields:
            name = SPELLINGS[word]
            tell(_hint(word, name))
        if name in named:
            raise Refused(f"{where}: {spelled[name]} and {word} both say {name}: keep one")
        named[name], spelled[name] = value, word
    return named


def _hint(word: str, name: str) -> str:
    if name == "family":
        return f"hint: {word} is read as family, a folder made by `heliostat init FAMILY --base MODEL`"
    return f"hint: {word} is read as {name}"


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def _explain(kind: type[Pace], error: ValidationError) -> str:
    """All faults, one a line, each with its argument, its value and what would do."""
    faults: dict[str, list[Any]] = {}
    for fault in error.errors():
        faults.setdefault(".".join(map(str, fault["loc"][:1])), []).append(fault)
    lines = [_explain_one(kind, name, together) for name, together in faults.items()]
    return lines[0] if len(lines) == 1 else "\n".join(["", *(f"  {line}" for line in lines)])


def _explain_one(kind: type[Pace], name: str, faults: list[Any]) -> str:
    """One argument's fault; an argument of several kinds (a number or auto) has a fault for each kind."""
    first = faults[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    if first["type"] == "extra_forbidden":
        return f"no argument {name!r}{_nearest(name, [*kind.model_fields, *SPELLINGS])}"
    if first["type"] == "missing":
        return _missing(name)
    words = [_KINDS.get(fault["type"], fault["msg"].removeprefix("Input should be ")) for fault in faults]
    choices = [
        c.strip("' ") for f in faults if f["type"] == "literal_error" for c in _choices(f["ctx"]["expected"])
    ]
    given = first["input"]
    return f"{name} is {given!r}; it must be {', or '.join(words)}{_nearest(str(given), choices)}"


def _missing(name: str) -> str:
    if name != "sharing":
        return f"{name} is missing"
    ways = "\n".join(
        f"    {way}: {facts.choose_when} (shared: {facts.shared})" for way, facts in SHARINGS.items()
    )
    return f"sharing is missing; choose\n{ways}"


def _choices(expected: str) -> list[str]:
    return expected.replace(" or ", ", ").split(", ")


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
