"""Training data as people have it: jsonl in five formats, read into one kind of record, every bad line named.

The first line that fits a format decides for its file. Knows no tokenizer: train.data makes ids of records.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from heliostat.errors import Refused

SHOWN = 10
"""Bad lines that an error shows."""

_ONE_LIST = "; a file of one JSON list becomes jsonl by: jq -c '.[]' OLD > NEW"
ORDER = "[system] user assistant user assistant ..."
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
}


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: str
    """system, user or assistant."""
    content: str
    learned: bool = True
    """For an assistant's turn: whether it is an answer to learn, or only context."""

    @property
    def message(self) -> dict[str, str]:
        """As a chat template takes it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Record:
    """One line of data: a conversation, or a text without roles (then there are no turns)."""

    turns: tuple[Turn, ...] = ()
    text: str | None = None
    plain: bool = False
    """The turns are a bare prompt and its completion: a tokenizer without a chat template can take them."""
    line: int = 0
    """Where it stands in its file, from 1."""

    @property
    def question(self) -> tuple[Turn, ...]:
        """The turns before the last answer; all of them where none was given."""
        return self.turns[:-1] if self.answer is not None else self.turns

    @property
    def asked(self) -> str:
        """The last question for people to read, with how much of the conversation came before it."""
        earlier = sum(turn.role != "system" for turn in self.question[:-1])
        turns = f"{earlier} turn{'s' * (earlier != 1)}"
        return f"[{turns} before] {self.question[-1].content}" if earlier else self.question[-1].content

    @property
    def answer(self) -> str | None:
        """The last answer, where one was given."""
        return self.turns[-1].content if self.turns and self.turns[-1].role == "assistant" else None


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that cannot be used, and why."""

    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class Records:
    """What a file held."""

    path: Path
    format: str
    """A name of FORMATS; '' where no line fits any."""
    records: tuple[Record, ...]
    bad: tuple[BadLine, ...]

    def checked(self, *, skip_bad: bool) -> Records:
        """These records, or a refusal that shows bad lines; with ``skip_bad`` only if nothing is left."""
        if self.bad and not (skip_bad and self.records):
            raise Refused(self._complaint())
        if not self.records:
            raise Refused(f"{self.path} is empty; it should hold one JSON object a line: {_wanted()}")
        return self

    def _complaint(self) -> str:
        total = len(self.records) + len(self.bad)
        head = f"{self.path}: {len(self.bad)} of {total} lines cannot be used"
        lines = [f"  {self.path}:{bad.line}: {bad.reason}" for bad in self.bad[:SHOWN]]
        if len(self.bad) > SHOWN:
            lines.append(f"  ... and {len(self.bad) - SHOWN} more")
        way_out = "mend them, or leave them out (train --skip-bad)" if self.records else "mend them"
        if not self.format:
            way_out = f"lines should look like {_wanted()}"
        return "\n".join([f"{head}:", *lines, way_out])


def read_jsonl(path: str | Path, *, skip_bad: bool = False, prompts: bool = False) -> Records:
    """All records of a file; refused with path, line numbers and reasons where a line is bad and not skipped.

    ``prompts``: the records are questions for a teacher; last answers may be missing, and are left out.
    """
    return scan(path, prompts=prompts).checked(skip_bad=skip_bad)


def scan(path: str | Path, *, prompts: bool = False) -> Records:
    """All records of a file and all its bad lines; refused only where the file cannot be opened."""
    path, name = Path(path), ""
    records: list[Record] = []
    bad: list[BadLine] = []
    for number, raw in _lines(path):
        try:
            item = _parse(raw)
            name = name or _detect(item)
            record = replace(_read(item, name, prompts), line=number)
            records.append(_check_order(record, prompts=prompts))
        except Refused as reason:
            bad.append(BadLine(number, str(reason)))
    return Records(path, name, tuple(records), tuple(bad))


def _read(item: Mapping[str, Any], name: str, prompts: bool) -> Record:
    """A record of the file's format; a line that shows another one is told so."""
    try:
        return FORMATS[name](item, prompts)
    except Refused as error:
        shown = [form for key, form in _BETRAYED_BY.items() if key in item]
        if not shown or name in shown:
            raise
        raise Refused(
            f"{error}: it looks like {shown[0]}, but this file is read as {name} because of its first line; one "
            "format a file, give several with --data"
        ) from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines; those that are blank at the end of the file are no lines."""
    blank: list[tuple[int, bytes]] = []
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                blank.append((number, raw))
                if raw.strip():
                    yield from blank
                    blank.clear()
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}") from error


def _parse(raw: bytes) -> dict[str, Any]:
    """The object of one line."""
    if not raw.strip():
        raise Refused("empty line")
    try:
        item = json.loads(raw.decode("utf-8"), object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise Refused(f"not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start + 1}") from error
    except json.JSONDecodeError as error:
        hint = _ONE_LIST if raw.strip() == b"[" else ""
        raise Refused(f"malformed JSON: {error.msg} at position {error.pos + 1}{hint}") from error
    except (ValueError, RecursionError) as error:
        raise Refused(f"malformed JSON: {error}") from error
    if not isinstance(item, dict):
        raise Refused(f"not a JSON object but {_kind(item)}{_ONE_LIST if isinstance(item, list) else ''}")
    return item


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, each key of which is there once."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key in found if sum(other == key for other, _ in pairs) > 1)
        raise ValueError(f"the key {twice!r} occurs twice")
    return found


def _detect(item: Mapping[str, Any]) -> str:
    for key, name in _BETRAYED_BY.items():
        if key in item:
            return name
    raise Refused(
        f"no known format: its keys are {', '.join(map(repr, item)) or 'none'}; expected {_wanted()}"
    )


def _wanted() -> str:
    return (
        '{"messages": [...]}, {"prompt": ..., "completion": ...}, {"instruction": ..., "output": ...}, '
        '{"conversations": [...]} or {"text": ...}'
    )


def _read_messages(item: Mapping[str, Any], prompts: bool) -> Record:
    return Record(_turns(_need(item, "messages"), "messages"))


def _read_sharegpt(item: Mapping[str, Any], prompts: bool) -> Record:
    return Record((*_system(item), *_turns(_need(item, "conversations"), "conversations")))


def _read_prompt(item: Mapping[str, Any], prompts: bool) -> Record:
    """prompt and completion, a text or, as in trl, a list of messages; a prompt's answers are context."""
    prompt = _need(item, "prompt")
    if isinstance(prompt, list):
        asked = tuple(replace(turn, learned=turn.role != "assistant") for turn in _turns(prompt, "prompt"))
    else:
        asked = (Turn("user", _filled(prompt, "prompt")),)
    if prompts:
        return Record(asked, plain=isinstance(prompt, str))
    completion = _need(item, "completion")
    if isinstance(completion, list):
        return Record((*asked, *_turns(completion, "completion")))
    answer = Turn("assistant", _filled(completion, "completion"))
    return Record((*asked, answer), plain=isinstance(prompt, str))


def _read_alpaca(item: Mapping[str, Any], prompts: bool) -> Record:
    """instruction, optional input (on a new line), output; optional system and history (earlier pairs)."""
    asked = _filled(_need(item, "instruction"), "instruction")
    if item.get("input"):
        asked = f"{asked}\n{_text(item['input'], 'input')}"
    earlier = [*_system(item), *_history(item.get("history") or [])]
    turns = (*earlier, Turn("user", asked))
    if not prompts:
        turns = (*turns, Turn("assistant", _filled(_need(item, "output"), "output")))
    return Record(turns, plain=not earlier)


def _read_text(item: Mapping[str, Any], prompts: bool) -> Record:
    if prompts:
        raise Refused("a text has no prompt that could be answered")
    return Record(text=_filled(_need(item, "text"), "text"))


FORMATS: Mapping[str, Callable[[Mapping[str, Any], bool], Record]] = {
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "prompt/completion": _read_prompt,
    "alpaca": _read_alpaca,
    "text": _read_text,
}

_BETRAYED_BY = {
    "messages": "messages",
    "conversations": "sharegpt",
    "prompt": "prompt/completion",
    "instruction": "alpaca",
    "text": "text",
}


def _system(item: Mapping[str, Any]) -> tuple[Turn, ...]:
    return (Turn("system", _text(item["system"], "system")),) if item.get("system") else ()


def _history(pairs: Any) -> Iterator[Turn]:
    if not isinstance(pairs, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs):
        raise Refused("'history' must be a list of [question, answer] pairs")
    for number, (asked, answered) in enumerate(pairs, start=1):
        yield Turn("user", _filled(asked, f"history pair {number}"))
        yield Turn("assistant", _filled(answered, f"history pair {number}"))


def _turns(entries: Any, key: str) -> tuple[Turn, ...]:
    if not isinstance(entries, list):
        raise Refused(f"{key!r} must be a list of messages, not {_kind(entries)}")
    if not entries:
        raise Refused(f"{key!r} is empty")
    return tuple(_turn(entry, number) for number, entry in enumerate(entries, start=1))


def _turn(entry: Any, number: int) -> Turn:
    """One message, in the spelling of OpenAI (role, content) or of ShareGPT (from, value)."""
    if not isinstance(entry, dict):
        raise Refused(f"message {number} is not an object but {_kind(entry)}")
    spelling = ("from", "value") if "from" in entry else ("role", "content")
    named = _need(entry, spelling[0], where=f"message {number}: ")
    role = _ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        raise Refused(f"message {number} has role {named!r}; roles are system, user, assistant")
    if entry.get("tool_calls"):
        raise Refused(f"message {number} has tool_calls, which are not read: write the call into its content")
    content = _need(entry, spelling[1], where=f"message {number}: ")
    what = "answer" if role == "assistant" else f"{role} content"
    checked = _text(content, what, number) if role == "system" else _filled(content, what, number)
    return Turn(role, checked, learned=_is_learned(entry, number))


def _is_learned(entry: Mapping[str, Any], number: int) -> bool:
    """``weight`` is OpenAI's word for it, ``train`` axolotl's."""
    for key in ("weight", "train"):
        if entry.get(key, 1) not in (0, 1):
            raise Refused(
                f"message {number}: {key} is {entry[key]!r}; only 0 (context) and 1 (learn it) are known"
            )
    return bool(entry.get("weight", 1)) and bool(entry.get("train", 1))


def _check_order(record: Record, *, prompts: bool) -> Record:
    """The record if its turns take turns; for ``prompts`` without the last answer."""
    if record.text is not None:
        return record
    turns = record.turns
    _check_roles([turn.role for turn in turns])
    if prompts:
        return replace(record, turns=record.question)
    if turns[-1].role != "assistant":
        raise Refused("no answer to learn: it ends with a user's turn (prompts alone need a --teacher)")
    if not any(turn.learned for turn in turns if turn.role == "assistant"):
        raise Refused("no answer to learn: every assistant's turn has weight 0")
    return record


def _check_roles(roles: Sequence[str]) -> None:
    begin = 1 if roles[0] == "system" else 0
    if len(roles) == begin:
        raise Refused(f"wrong role order: a system turn alone; it must be {ORDER}")
    for place, role in enumerate(roles[begin:]):
        wanted = ("user", "assistant")[place % 2]
        if role != wanted:
            number = begin + place + 1
            raise Refused(
                f"wrong role order: message {number} is {role!r}, not {wanted!r}; it must be {ORDER}"
            )


def _need(item: Mapping[str, Any], key: str, *, where: str = "") -> Any:
    if key not in item:
        raise Refused(f"{where}missing key {key!r}; it has {', '.join(map(repr, item)) or 'none'}")
    return item[key]


def _filled(value: Any, what: str, number: int | None = None) -> str:
    text = _text(value, what, number)
    if not text.strip():
        raise Refused(f"empty {what}" + (f" in message {number}" if number else ""))
    return text


def _text(value: Any, what: str, number: int | None = None) -> str:
    """A text, or OpenAI's list of text parts, joined."""
    if (
        isinstance(value, list)
        and value
        and all(isinstance(p, dict) and p.get("type") == "text" for p in value)
    ):
        value = "".join(_text(_need(part, "text"), what, number) for part in value)
    if not isinstance(value, str):
        raise Refused(
            f"{what} must be a text, not {_kind(value)}" + (f" (message {number})" if number else "")
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Refused(
            f"{what} is no valid Unicode: half a surrogate pair at position {error.start + 1}"
        ) from error
    return value


def _kind(value: Any) -> str:
    kinds = {list: "a list", dict: "an object", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
