"""A tokenizer's folder: what is read of it, what its text rules are, and what makes two of them the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from heliostat.errors import Refused
from heliostat.files import read_json

# Settings and version stamps that do not change which ids a text has, or that are told apart in another way.
_NOT_CONTENT = ("version", "truncation", "padding", "post_processor", "added_tokens")


def load_fast(folder: Path) -> Any:
    """transformers' wrapper around the tokenizer of a folder; no code of the folder is run."""
    from transformers import PreTrainedTokenizerFast

    try:
        # Not AutoTokenizer: some of its classes rebuild rules and add tokens. tokenizer.json decides.
        return PreTrainedTokenizerFast.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the file's faults surface as many kinds of error
        raise Refused(f"the tokenizer in {folder} cannot be loaded: {error}") from error


def content_of(folder: Path) -> dict[str, Any]:
    """tokenizer.json, parsed."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise Refused(
            f"{folder} has no tokenizer.json; heliostat reads fast tokenizers only. "
            "transformers makes one: AutoTokenizer.from_pretrained(OLD).save_pretrained(NEW)"
        )
    content = read_json(path)
    if not isinstance(content.get("model"), dict):
        raise Refused(f"{path} holds no tokenizer: it has no 'model'")
    return content


def end_ids(folder: Path, fast: Any) -> tuple[int, ...]:
    """The tokenizer's own end token first, then those of generation_config.json."""
    ids = [] if fast.eos_token_id is None else [int(fast.eos_token_id)]
    path = folder / "generation_config.json"
    if path.is_file():
        named = read_json(path).get("eos_token_id")
        named = named if isinstance(named, list) else [] if named is None else [named]
        if any(type(token) is not int for token in named):
            raise Refused(f"{path}: eos_token_id is {named!r}; it must be a token id or a list of them")
        ids += named
    return tuple(dict.fromkeys(ids))


def prefix_of(backend: Any) -> tuple[int, ...]:
    """What stands before a text when special tokens are added. An end added behind it is no prompt's."""
    plain = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    for place in range(len(full) - len(plain) + 1):
        if full[place : place + len(plain)] == plain:
            return tuple(full[:place])
    raise Refused(
        "the tokenizer gives a text other ids when it adds special tokens: such a one is not supported"
    )


def is_spaced(backend: Any) -> bool:
    """Whether encoding puts a space before every text."""
    once = backend.encode("a", add_special_tokens=False).ids
    return bool(backend.decode(once + once) != "aa")


def size_of(backend: Any, pad: int | None) -> int:
    """1 + the largest id. A padding token behind all others does not count: padding never reaches a model."""
    ids = set(backend.get_vocab(with_added_tokens=True).values())
    if pad is not None and pad == max(ids):
        ids.discard(pad)
    return max(ids, default=-1) + 1


PARTS = {
    "vocabulary or rules": ("rules",),
    "special tokens": ("added", "eos", "prefix"),
    "chat template": ("template",),
}


def facts_of(
    content: Mapping[str, Any], fast: Any, size: int, eos_ids: Sequence[int], prefix: Sequence[int]
) -> dict[str, Any]:
    """The same for folders that give all texts and conversations the same ids, however they were saved."""
    rules = {key: value for key, value in content.items() if key not in _NOT_CONTENT}
    model = {key: value for key, value in rules["model"].items() if value is not None and value is not False}
    if isinstance(model.get("merges"), list):  # two spellings: "a b" and ["a", "b"]
        model["merges"] = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
    added = {
        token: [str(t), t.special, t.normalized, t.lstrip, t.rstrip, t.single_word]
        for token, t in fast.added_tokens_decoder.items()
        if token < size
    }
    return {
        "rules": {**rules, "model": model},
        "added": sorted(added.items()),
        "eos": list(eos_ids),
        "prefix": list(prefix),
        "template": fast.chat_template,
    }


def digest_of(facts: Any) -> str:
    """SHA-256 (hex) of facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
