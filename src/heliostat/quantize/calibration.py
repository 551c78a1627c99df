"""Texts that a module is fitted on: records or plain text as rows of token ids, some held out. Bad ones are refused."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from heliostat.errors import Refused
from heliostat.model.config import ModelConfig
from heliostat.model.tokenizer import Tokenizer
from heliostat.train.data import document_ids, encode
from heliostat.train.formats import Record, read_jsonl
from heliostat.train.text import PackedRows

LONGEST = 256
"""Tokens of a row, at most."""
SHORTEST = 8
HELD_OUT = 8
"""One row of so many is held out, and says what the fit is worth."""
PLAIN = (".txt", ".md")


@dataclass(frozen=True, slots=True)
class Calibration:
    """Rows [N, T] that are fitted on, and rows that no fit sees."""

    fitted: PackedRows
    held_out: PackedRows

    @property
    def tokens(self) -> int:
        """That are fitted on."""
        return self.fitted.ids.numel()


def read_calibration(
    path: Path, tokenizer: Tokenizer, config: ModelConfig, *, tokens: int, seed: int
) -> Calibration:
    """Rows of about ``tokens`` tokens of a file: jsonl of any kind that training reads, or plain text (.txt, .md).

    Which texts they are is drawn by ``seed``. Raises Refused for bad lines, for ids that the model has not, and where
    there are fewer tokens than the widest Linear has inputs, so that most of it would be guessed.
    """
    documents = list(_documents(Path(path), tokenizer, config))
    random.Random(seed).shuffle(documents)
    total, kept = 0, []
    wanted = tokens * HELD_OUT // (HELD_OUT - 1)
    for document in documents:
        if total >= wanted:
            break
        kept.append(document)
        total += len(document)
    widest = max(inputs for inputs, _ in config.linears.values())
    needed = widest * HELD_OUT // (HELD_OUT - 1) + 2 * SHORTEST
    if total < needed:
        raise Refused(
            f"{path} gives {total:,} tokens, and {needed:,} are needed at least: the widest Linear has {widest:,} inputs "
            f"(one row of {HELD_OUT} is held out). Give more text, or raise --tokens ({tokens:,})"
        )
    length = max(SHORTEST, min(LONGEST, config.max_length, total // (2 * HELD_OUT)))
    rows = PackedRows.of(kept, length)
    count = max(1, len(rows.ids) // HELD_OUT)
    return Calibration(_part(rows, slice(count, None)), _part(rows, slice(None, count)))


def _part(rows: PackedRows, part: slice) -> PackedRows:
    return PackedRows(rows.ids[part], rows.documents[part], rows.positions[part])


def _documents(path: Path, tokenizer: Tokenizer, config: ModelConfig) -> Iterator[list[int]]:
    """The token ids of every text, in the order of the file."""
    for where, ids in _read(path, tokenizer):
        if strange := [token for token in ids if not 0 <= token < config.vocabulary]:
            raise Refused(
                f"{where}: token id {strange[0]}, and the model's ids are 0 to {config.vocabulary - 1}: this is not its "
                "tokenizer"
            )
        yield ids


def _read(path: Path, tokenizer: Tokenizer) -> Iterator[tuple[str, list[int]]]:
    """(where it stands, token ids) of every text."""
    if path.suffix.lower() in PLAIN:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise Refused(f"{path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise Refused(f"{path} is not UTF-8: byte at position {error.start + 1}") from error
        records = [Record(text=part, line=n) for n, part in enumerate(text.split("\n\n"), 1) if part.strip()]
        if not records:
            raise Refused(f"{path} is empty: there is nothing to calibrate on")
    else:
        records = list(read_jsonl(path).records)
    for record in records:
        where = f"{path}:{record.line}"
        try:
            if record.text is not None:
                yield where, document_ids(record, tokenizer)
                continue
            for example in encode(record, tokenizer, max_length=2**31):
                yield where, list(example.ids)
        except Refused as error:
            raise Refused(f"{where}: {error}") from error


def batches(rows: PackedRows, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(ids, documents, positions), each [B, T], of so many rows at a time, in order."""
    for start in range(0, len(rows.ids), size):
        part = _part(rows, slice(start, start + size))
        yield part.ids.long(), part.documents, part.positions
