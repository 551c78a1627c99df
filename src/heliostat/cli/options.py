"""Long options made from the fields of recipes and of Sampling, where names, help and defaults stand."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import typer
from pydantic import BaseModel

from heliostat.engine.request import Sampling
from heliostat.train.recipe import Pace
from heliostat.train.spellings import SPELLINGS

F = TypeVar("F", bound=Callable[..., Any])

_WORDS = {int: "INT", float: "NUMBER", str: "TEXT", bool: "true|false"}


def taking(*groups: Iterable[inspect.Parameter]) -> Callable[[F], F]:
    """Gives a function that ends in ``**flags`` these options in its signature, for typer to read."""

    def change(function: F) -> F:
        plain = inspect.signature(function, eval_str=True)
        own = [p for p in plain.parameters.values() if p.kind is not p.VAR_KEYWORD]
        added = [parameter for group in groups for parameter in group]
        order = sorted([*own, *added], key=lambda p: p.default is not p.empty)
        function.__signature__ = plain.replace(parameters=[_keyword(p) for p in order])  # type: ignore[attr-defined]
        function.__annotations__ = {p.name: p.annotation for p in order} | {"return": None}
        return function

    return change


def given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were typed."""
    return {name: value for name, value in flags.items() if value is not None and value != []}


def recipe_options(recipe: type[Pace]) -> Iterator[inspect.Parameter]:
    """An option for every field of a recipe, then hidden ones for other tools' spellings."""
    own = [name for name in recipe.model_fields if name not in Pace.model_fields]
    for name in [*own, *Pace.model_fields]:
        field = recipe.model_fields[name]
        default = None if field.is_required() or field.default is None else _shown(field.default)
        yield _option(name, field.annotation, help=field.description, default=default, words=True)
    for word, name in SPELLINGS.items():
        if name in recipe.model_fields and word not in recipe.model_fields:
            yield _parameter(word, str, typer.Option(_flag(word), hidden=True))


def sampling_options() -> Iterator[inspect.Parameter]:
    """An option for every field of Sampling; ``logit_bias`` is given as TOKEN=BIAS, once or several times."""
    return options_of(Sampling, spelled={"logit_bias": (tuple[str, ...], "TOKEN=BIAS")})


def options_of(
    facts: type,
    *,
    without: Collection[str] = (),
    spelled: Mapping[str, tuple[Any, str]] | None = None,
    like: object | None = None,
) -> Iterator[inspect.Parameter]:
    """An option for every field of a dataclass, but those ``without``; ``spelled``: (type, metavar) of some.

    ``like``: an instance whose values are the defaults that are shown.
    """
    kinds, docs = get_type_hints(facts), attribute_docs(facts)
    for field in dataclasses.fields(facts):
        if field.name in without:
            continue
        usual = field.default if like is None else getattr(like, field.name)
        default = None if usual in (dataclasses.MISSING, None, ()) else _shown(usual)
        kind, metavar = (spelled or {}).get(field.name, (kinds[field.name], None))
        told = docs.get(field.name, "").replace("``", "")
        yield _option(field.name, kind, help=told, default=default, metavar=metavar)


def attribute_docs(cls: type) -> dict[str, str]:
    """The docstrings that stand below the fields of a class, read from its source."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    return {
        above.target.id: inspect.cleandoc(below.value.value)
        for above, below in pairwise(tree.body)
        if isinstance(above, ast.AnnAssign)
        and isinstance(above.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }


def _option(
    name: str,
    kind: Any,
    *,
    help: str | None,
    default: str | None,
    words: bool = False,
    metavar: str | None = None,
) -> inspect.Parameter:
    """``words``: values stay as they are typed, for a recipe to read and to complain about."""
    parts = set(_parts(kind))
    flags = [f"{_flag(name)}/{_flag('no-' + name)}"] if parts == {bool} else [_flag(name)]
    several = get_origin(kind) is tuple
    told = [
        help or "",
        "May be given several times." if several else "",
        f"[default: {default}]" if default is not None else "",
    ]
    option = typer.Option(
        *flags,
        help="  ".join(filter(None, told)),
        show_default=False,
        metavar=None if parts == {bool} else metavar or _metavar(parts),
    )
    if several:
        return _parameter(name, list[str], option)
    if parts == {bool}:
        return _parameter(name, bool, option)
    numbers = parts & {int, float}
    return _parameter(name, str if words or not numbers else next(iter(numbers)), option)


def _parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _keyword(parameter: inspect.Parameter) -> inspect.Parameter:
    return parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parts(kind: Any) -> Iterator[Any]:
    """The plain types and allowed words that a type comes down to."""
    origin = get_origin(kind)
    if origin is Annotated:
        yield from _parts(get_args(kind)[0])
    elif origin is Literal:
        yield from get_args(kind)
    elif origin in (Union, UnionType):
        for part in get_args(kind):
            yield from _parts(part)
    elif origin is tuple:
        yield from _parts(get_args(kind)[0])
    elif kind is not NoneType:
        yield kind


def _metavar(parts: set[Any]) -> str:
    kinds = [word for kind, word in _WORDS.items() if kind in parts]
    return "|".join([*kinds, *sorted(part for part in parts if isinstance(part, str))])


def _shown(default: Any) -> str:
    """A default as it would be typed."""
    if isinstance(default, tuple):
        return ",".join(default)
    return str(default).lower() if isinstance(default, bool) else str(default)


def fields_of(recipe: type[BaseModel], words: Iterable[str]) -> set[str]:
    """The fields that these words, ours or other tools', speak of."""
    return {word if word in recipe.model_fields else SPELLINGS.get(word, word) for word in words}
