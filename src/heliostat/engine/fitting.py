"""Whether modules fit an engine whose page pool is laid out: shape, number format, device, names, length."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping

from heliostat.build import Loaded
from heliostat.engine.paged import PagePool
from heliostat.errors import Refused
from heliostat.model.config import ModelConfig
from heliostat.model.transformer import Transformer

_SHAPE = ("layers", "kv_heads", "head_width", "vocabulary", "rope", "attention")
"""What modules must have in common so that each can read what another wrote, and say the same tokens."""


def refuse_misfits(
    modules: Mapping[str, Loaded],
    *,
    names: Collection[str],
    models: Mapping[str, Transformer],
    config: ModelConfig,
    pool: PagePool,
    max_length: int,
) -> None:
    """Raise Refused for the first module that cannot join ``names``, which run on ``models`` and share ``pool``."""
    together = dict(models)
    for name, module in modules.items():
        if name in names:
            raise Refused(f"there is already a module {name!r}: unload it first, or choose another name")
        if together.setdefault(module.weights, module.model) is not module.model:
            raise Refused(
                f"module {name!r} runs on other weights than those loaded as {module.weights!r}: put it on the "
                "model that is loaded (load_modules takes it as models), or unload what uses that first"
            )
        refuse_shape(name, module.model.config, config)
        _refuse_format(name, module.model, pool)
        if module.model.config.max_length < max_length:
            raise Refused(
                f"module {name!r} runs {module.model.config.max_length} tokens exactly, and requests here may have "
                f"{max_length}: start with a lower max_length"
            )


def fit_of(config: ModelConfig, *, tokenizer: str, dtype: str, page_size: int) -> str:
    """Digest of all that two engines must have in common before one may read the other's pages, or go on with its
    answers; ``tokenizer``: digest of the tokenizer with its template."""
    found = {what: getattr(config, what) for what in _SHAPE}
    facts = {what: repr(sorted(v.items()) if isinstance(v, Mapping) else v) for what, v in found.items()}
    facts |= {"tokenizer": tokenizer, "dtype": dtype, "page_size": str(page_size)}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def refuse_shape(name: str, found: ModelConfig, wanted: ModelConfig) -> None:
    """Raise Refused for a module that cannot read what those loaded write."""
    for what in _SHAPE:
        ours, theirs = getattr(wanted, what), getattr(found, what)
        if ours != theirs:
            raise Refused(
                f"module {name!r} has {what} {theirs!r}, those loaded have {ours!r}: modules that share pages are of "
                "one base; serve this one by an engine of its own"
            )


def _refuse_format(name: str, model: Transformer, pool: PagePool) -> None:
    if model.dtype.itemsize > pool.keys.dtype.itemsize:
        raise Refused(
            f"module {name!r} is {model.dtype}, the pages are {pool.keys.dtype} and would round what it writes: load "
            "it in the format of the pages, or start with --dtype float32"
        )
    if model.device != pool.keys.device:
        raise Refused(f"module {name!r} is on {model.device}, the pages are on {pool.keys.device}")
