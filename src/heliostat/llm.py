"""The offline face of the engine: a family in a folder, prompts in, answers out."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch

from heliostat.build import (
    Loaded,
    best_dtype,
    load_modules,
    load_tokenizer,
    modules_of,
    read_family,
    verify_member,
)
from heliostat.engine.engine import Engine, Piece
from heliostat.engine.grammar import Grammars
from heliostat.engine.ledger import MIB, available_memory
from heliostat.engine.plan import Plan, plan_around, plan_of
from heliostat.engine.remembered import Remembered
from heliostat.engine.request import FinishReason, Matcher, Request, Sampling
from heliostat.engine.speculation.loading import drafting_of
from heliostat.engine.speculation.rule import Rule, Speculated
from heliostat.engine.speculation.speculator import Drafting
from heliostat.engine.speculation.wanted import AHEAD, Wanted
from heliostat.errors import Refused
from heliostat.family import Family, Row
from heliostat.model.tokenizer import Tokenizer

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]
"""A text, a conversation (messages), or exact token ids."""
Schema = Mapping[str, Any]
"""A JSON schema."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a member said to one prompt."""

    member: str
    text: str
    ids: tuple[int, ...]
    """Token ids, the end token included where one was chosen."""
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that were not run because their K,V were there already, whoever's request wrote them."""
    logprobs: tuple[float, ...] = ()
    """Natural log-probability of each id, where asked for."""
    rule: str | None = None
    """By which drafted tokens were taken; None: none were drafted."""
    speculated: Speculated = field(default_factory=Speculated)
    """What was drafted, and what came of it."""


class LLM:
    """A family, ready to answer: ``LLM("fam/").generate("...", member="math")``.

    Loads the modules that ``members`` need (default: all members and the base), each once.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        members: Sequence[str] | None = None,
        dtype: str = "auto",
        device: str = "cpu",
        max_length: int | None = None,
        cache_mib: int = 1024,
        max_running: int = 64,
        memory_mib: int | None = None,
        draft: str | None = None,
        verify: str | Sequence[str] = (),
        judge: str | None = None,
        ahead: int = AHEAD,
        adaptive: bool = True,
    ) -> None:
        """``dtype``: auto, float32 or bfloat16; ``cache_mib``: most memory for K,V pages.

        ``max_length``: most tokens of a request; None: the model's length, or what ``cache_mib`` holds if less.
        ``memory_mib``: most memory for all; None: what the machine, or the device, has left.
        ``draft``: a module of the family, or ``ngram``: tokens are drafted, and taken by the first rule of ``verify``
        (none: lossless). At most ``ahead`` a step, and less where that is faster, unless not ``adaptive``.

        Raises Refused for a family that is missing, damaged or changed since its members were tuned, and, before it
        is loaded, for one that does not fit into memory.
        """
        rules = (verify,) if isinstance(verify, str) else tuple(verify)
        self.wanted = Wanted(draft=draft, verify=rules, judge=judge, ahead=ahead, adaptive=adaptive)
        folder = Path(folder)
        self.family = read_family(folder)
        names = self._whole(members, folder)
        kind = best_dtype(device) if dtype == "auto" else parse_dtype(dtype)
        needed = modules_of(self.family, names)
        plan = plan_of(
            folder,
            self.family,
            needed,
            dtype=kind,
            max_length=max_length,
            cache_mib=cache_mib,
            max_running=max_running,
            wanted=self.wanted,
        )
        _refuse_too_large(plan, device, memory_mib)
        tokenizer = load_tokenizer(folder, self.family)
        modules = load_modules(folder, self.family, needed, dtype=kind, device=device, joined=True)
        rows = {name: self.family.row(name) for name in names}
        drafting = drafting_of(
            self.wanted,
            folder,
            self.family,
            [row.speaker for row in rows.values()],
            tokenizer=tokenizer,
            dtype=kind,
            device=device,
            there=modules,
        )
        self._start(modules, rows, tokenizer, plan, max_running, drafting)

    def _whole(self, members: Sequence[str] | None, folder: Path) -> list[str]:
        """Whom to load; Refused where one is not what it was tuned as."""
        names = list(members) if members is not None else [*self.family.members, "base"]
        for name in names:
            if name in self.family.members:
                verify_member(self.family, name, folder=folder)
        return names

    @classmethod
    def of(
        cls,
        modules: Mapping[str, Loaded],
        rows: Mapping[str, Row],
        tokenizer: Tokenizer,
        *,
        max_length: int | None = None,
        cache_mib: int = 256,
        max_running: int = 64,
        memory_mib: int | None = None,
    ) -> LLM:
        """An LLM around modules that are in memory already, as in training; ``rows`` are the members it knows.

        Raises Refused where its pages and workspace do not fit beside them: into ``memory_mib``, or into what is left.
        """
        self = cls.__new__(cls)
        self.family = Family({}, {}, tokenizer.digest)
        models = [module.model for module in modules.values()]
        plan = plan_around(models, max_length=max_length, cache_mib=cache_mib, max_running=max_running)
        _refuse_too_large(plan, str(models[0].device), memory_mib)
        self.wanted = Wanted()
        self._start(modules, rows, tokenizer, plan, max_running)
        return self

    def _start(
        self,
        modules: Mapping[str, Loaded],
        rows: Mapping[str, Row],
        tokenizer: Tokenizer,
        plan: Plan,
        max_running: int,
        drafting: Drafting | None = None,
    ) -> None:
        self.rows, self.tokenizer = dict(rows), tokenizer
        self.engine = Engine(
            modules,
            tokenizer,
            max_length=plan.max_length,
            pages=plan.pages,
            max_running=max_running,
            drafting=drafting,
        )
        self._numbers = count()
        self._grammars: Grammars | None = None
        self.remembered = Remembered()

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """The exact token ids the model sees for a prompt; a text is a user's turn where there is a chat template.

        Answers of this LLM that return in a conversation stand in it as they were said (``remembered``).
        """
        if isinstance(prompt, str):
            if not self.tokenizer.has_template:
                return tuple(self.tokenizer.plain_prompt_ids(prompt))
            return tuple(self.tokenizer.prompt_ids([{"role": "user", "content": prompt}]))
        if not isinstance(prompt, Sequence):
            raise Refused(f"a prompt is a text, messages or token ids, not {type(prompt).__name__}")
        ids = [token for token in prompt if isinstance(token, int)]
        messages = [message for message in prompt if isinstance(message, Mapping)]
        if len(prompt) not in (len(ids), len(messages)) or not prompt:
            raise Refused("a prompt is a text, or all messages, or all token ids (int), and not empty")
        return tuple(ids) if ids else tuple(self.remembered.prompt_ids(self.tokenizer, messages))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        member: str | Sequence[str] = "base",
        sampling: Sampling | None = None,
        schema: Schema | None = None,
        speculation: str | None = None,
        **options: Any,
    ) -> list[Answer]:
        """Answers in the order of the prompts; ``member`` is one name for all, or one a prompt.

        ``options`` are the fields of Sampling. All prompts run as one batch, whatever their members and rows. With a
        ``schema`` an answer is JSON that fits it, unless max_tokens or a stop string cut it. ``speculation``: one of
        the rules of ``verify``, or ``off``; None: the first of them.
        Raises Refused for an unknown member, a prompt that does not fit or a schema that cannot be kept.
        """
        many = _as_prompts(prompts)
        members = [member] * len(many) if isinstance(member, str) else list(member)
        if len(members) != len(many):
            raise Refused(f"{len(many)} prompts but {len(members)} members")
        wish = sampling or Sampling(**options)
        rule = self.wanted.rule(speculation)
        requests = [self._request(p, m, wish, schema, rule) for p, m in zip(many, members, strict=True)]
        chances: dict[str, list[float]] = {request.id: [] for request in requests}
        texts: dict[str, list[str]] = {request.id: [] for request in requests}
        for piece in self._run(requests):
            texts[piece.request.id].append(piece.text)
            if piece.sampled is not None and piece.sampled.logprob is not None:
                chances[piece.request.id].append(piece.sampled.logprob)
        return [_answer(r, "".join(texts[r.id]), chances[r.id]) for r in requests]

    def stream(
        self,
        prompt: Prompt,
        *,
        member: str = "base",
        sampling: Sampling | None = None,
        schema: Schema | None = None,
        speculation: str | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """One answer, piece by piece as it becomes certain; leaving the loop early frees its pages.

        ``speculation``: as for ``generate``.
        """
        wish, rule = sampling or Sampling(**options), self.wanted.rule(speculation)
        for piece in self._run([self._request(prompt, member, wish, schema, rule)]):
            if piece.text:
                yield piece.text

    def _request(
        self, prompt: Prompt, member: str, sampling: Sampling, schema: Schema | None, rule: Rule | None
    ) -> Request:
        if member not in self.rows:
            raise Refused(f"no member {member!r} is loaded; there is: {', '.join(sorted(self.rows))}")
        row = self.rows[member]
        digests = {name: self.engine.digests[name] for name in row.modules}
        name = f"{next(self._numbers)}-{secrets.token_hex(4)}"
        return Request(
            name,
            row=row,
            digests=digests,
            prompt=self.prompt_ids(prompt),
            sampling=sampling,
            member=member,
            matcher=self._matcher(schema),
            speculation=rule,
        )

    def _matcher(self, schema: Schema | None) -> Matcher | None:
        if schema is None:
            return None
        if self._grammars is None:
            self._grammars = Grammars(self.tokenizer)
        return self._grammars.matcher(schema)

    def _run(self, requests: Sequence[Request]) -> Iterator[Piece]:
        if self.engine.unfinished:
            raise Refused("another answer is still being streamed: read it to its end or close it first")
        texts = {request.id: "" for request in requests}
        try:
            for request in requests:
                self.engine.add(request)
            while self.engine.unfinished:
                for piece in self.engine.step():
                    texts[piece.request.id] += piece.text
                    if piece.finish_reason is not None:
                        self.remembered.remember(
                            self.tokenizer, texts[piece.request.id], piece.request.answer
                        )
                    yield piece
        finally:
            for request in requests:
                self.engine.abort(request.id)


def parse_dtype(name: str) -> torch.dtype:
    """A torch dtype by name; refused with the allowed names."""
    if name not in DTYPES:
        raise Refused(f"dtype {name!r}; allowed are auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _refuse_too_large(plan: Plan, device: str, memory_mib: int | None) -> None:
    plan.ledger.refuse_over(available_memory(device) if memory_mib is None else memory_mib * MIB)


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], (Mapping, int)))
    return [prompts] if single else list(prompts)  # type: ignore[arg-type, list-item]


def _answer(request: Request, text: str, logprobs: Sequence[float]) -> Answer:
    assert request.finish_reason is not None
    return Answer(
        request.member,
        text,
        tuple(request.answer),
        request.finish_reason,
        len(request.prompt),
        request.cached_tokens,
        tuple(logprobs),
        None if request.speculation is None else str(request.speculation),
        request.speculated,
    )
