"""Text for a new base: files become documents, documents a tokenizer where none is given, and packed rows.

Held out are whole documents of every file, or the end of a file that is one document.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from heliostat.errors import Refused
from heliostat.files import atomic_directory
from heliostat.model.tokenizer import Tokenizer
from heliostat.tasks import corpus
from heliostat.tasks import tokenizer as made
from heliostat.train.data import document_ids
from heliostat.train.formats import Record, read_jsonl
from heliostat.train.pretrain_recipe import SettledPretraining
from heliostat.train.text import PackedRows

EMBEDDED = "embedded"
MOST_TOKENS = 16_000_000
"""Tokens of the built-in corpus that are made at most; a longer run reads them again."""
TOKENIZER_TEXTS = 20_000
_EMPTY_LINES = re.compile(r"\n(?:[ \t]*\n)+")


def tokenizer_folder(recipe: SettledPretraining, run_folder: Path) -> Path:
    """The folder of the tokenizer: the given one, the teacher's, or one trained now and kept with the run."""
    given = recipe.tokenizer or recipe.teacher
    if given is not None:
        return Path(given)
    folder = run_folder / "tokenizer"
    if not folder.exists():
        texts = None if recipe.data == (EMBEDDED,) else _texts(recipe)
        with atomic_directory(folder) as partial:
            trained = made.train(vocabulary=recipe.vocab_size, texts=texts)
            made.save(trained, partial, max_length=recipe.max_position_embeddings)
    return folder


def read_rows(
    recipe: SettledPretraining, tokenizer: Tokenizer, echo: Callable[[str], None], *, processes: int = 1
) -> tuple[PackedRows, PackedRows]:
    """Rows to learn from and rows held out, for all processes. Refused, by file and line, where a file is no text."""
    learned: list[Sequence[int]] = []
    held_out: list[Sequence[int]] = []
    for path in recipe.data:
        found = (
            _embedded(recipe, tokenizer, processes)
            if path == EMBEDDED
            else _from_file(path, recipe, tokenizer)
        )
        if recipe.eval_data is None:
            found, kept = _parted(found, recipe.eval_share)
            held_out += kept
        learned += found
    if recipe.eval_data is not None:
        held_out = _from_file(recipe.eval_data, recipe, tokenizer)
    rows = PackedRows.of(learned, recipe.max_length)
    kept_rows = PackedRows.of(held_out, min(recipe.max_length, sum(map(len, held_out))))
    echo(
        f"{len(learned):,} documents, {rows.ids.numel():,} tokens in rows of {recipe.max_length}; "
        f"held out {kept_rows.ids.numel():,} tokens"
    )
    return rows, kept_rows


def paragraphs(path: Path) -> list[str]:
    """A text file cut at empty lines; refused, by name and line, where it is not UTF-8."""
    found = [part.strip() for part in _EMPTY_LINES.split(_text(path))]
    return [part for part in found if part]


def _text(path: Path) -> str:
    """A text file, its line ends as they are; refused where it cannot be read or holds nothing."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise Refused(f"{path} is missing") from error
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise Refused(
            f"{path}:{line}: not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start} of the file; "
            "convert it: iconv -t UTF-8"
        ) from error
    if not text.strip():
        raise Refused(f"{path} holds no text")
    return text.replace("\r\n", "\n")


def _texts(recipe: SettledPretraining) -> Iterator[str]:
    """What a tokenizer is trained on: contents, without the marks of a conversation."""
    for path in recipe.data:
        if path == EMBEDDED:
            yield from (corpus.rendered(d) for d in corpus.documents(recipe.seed, TOKENIZER_TEXTS))
        elif path.endswith(".jsonl"):
            for record in read_jsonl(path).records:
                yield record.text or "\n".join(turn.content for turn in record.turns)
        else:
            yield from paragraphs(Path(path))


def _parted(documents: list[Sequence[int]], share: float) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
    """What is learned and what is held out: whole documents, or the end of the only one."""
    if len(documents) == 1:
        cut = max(2, round(len(documents[0]) * share))  # of one token nothing is spoken
        return [documents[0][:-cut]], [documents[0][-cut:]]
    cut = max(1, round(len(documents) * share))
    return documents[cut:], documents[:cut]


def _embedded(recipe: SettledPretraining, tokenizer: Tokenizer, processes: int) -> list[Sequence[int]]:
    """The built-in corpus: as much as all processes of the run read, up to MOST_TOKENS."""
    wanted = min(MOST_TOKENS, round(1.02 * recipe.max_steps * recipe.tokens_per_batch * processes))
    documents: list[Sequence[int]] = []
    seen = 0
    stream = corpus.documents(recipe.seed, wanted)
    while seen < wanted:
        texts = [corpus.rendered(next(stream)) for _ in range(4096)]
        batch = [e.ids for e in tokenizer.backend.encode_batch(texts, add_special_tokens=False)]
        documents, seen = documents + batch, seen + sum(map(len, batch))
    return documents


def _from_file(path: str, recipe: SettledPretraining, tokenizer: Tokenizer) -> list[Sequence[int]]:
    """The documents of a file; token ids as numbers of four bytes, for there may be many."""
    if not path.endswith(".jsonl"):
        whole = recipe.document == "file"
        parts = [_text(Path(path)).strip()] if whole else paragraphs(Path(path))
        return [array("i", document_ids(Record(text=part), tokenizer)) for part in parts]
    found: list[Sequence[int]] = []
    for record in read_jsonl(path).records:
        try:
            found.append(array("i", _document(record, tokenizer)))
        except Refused as reason:
            raise Refused(f"{path}:{record.line}: {reason}") from reason
    return found


def _document(record: Record, tokenizer: Tokenizer) -> list[int]:
    """A text, or a conversation as its template writes it."""
    if record.text is not None:
        return document_ids(record, tokenizer)
    return tokenizer.encode(tokenizer.render([t.message for t in record.turns], generation=False))
