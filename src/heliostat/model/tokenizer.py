"""Text to token ids and back: tokenizer.json, the chat template, the exact ids training and serving share.

Whatever turns a conversation into ids, in training or in serving, calls ``prompt_ids`` or
``plain_prompt_ids``: there is one answer to "which tokens does the model see". Knows no model; imports
transformers when one is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError

from heliostat.errors import Refused
from heliostat.model.time_limit import Endless, within
from heliostat.model.tokenizer_folder import (
    PARTS,
    content_of,
    digest_of,
    end_ids,
    facts_of,
    is_spaced,
    load_fast,
    prefix_of,
    size_of,
)

UNFINISHED = "\ufffd"
"""What decoders put where the bytes of a character are incomplete, or wrong."""

RENDER_SECONDS = 5.0
"""A chat template that takes longer is refused: it is a program of whoever made the checkpoint, and may not end."""

# A character no merge starts from: text behind it is tokenized as text that goes on, not as text that begins.
_ANCHOR = "\x01"


@dataclass(frozen=True, slots=True, eq=False)
class Tokenizer:
    """A fast tokenizer with its chat template, made by ``load``; the same ``digest`` means the same ids."""

    backend: Any
    """tokenizers.Tokenizer, truncation and padding off."""
    fast: Any
    """transformers' wrapper; only its chat template is used."""
    eos_ids: tuple[int, ...]
    """Ids that end an answer; the first is the one training appends where a template adds none."""
    bos_id: int | None
    pad_id: int
    size: int
    """1 + the largest id a text can have: a model needs as many embeddings."""
    prefix: tuple[int, ...]
    """Ids the tokenizer puts before a bare prompt (bos, or nothing)."""
    spaced: bool
    """Whether encoding puts a space before every text, as SentencePiece does."""
    digest: str
    """SHA-256 (hex) over vocabulary, rules, special tokens and chat template."""
    parts: Mapping[str, str]
    """SHA-256 (hex) of each of these parts alone, by what to call it."""

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer of a Hugging Face folder; nothing is downloaded and no code of the folder is run.

        Refused where tokenizer.json is missing or damaged.
        """
        folder = Path(folder)
        content = content_of(folder)
        fast = load_fast(folder)
        backend = fast.backend_tokenizer
        backend.no_truncation()  # a tokenizer saved while it truncated would cut prompts without a word
        backend.no_padding()
        eos_ids, prefix = end_ids(folder, fast), prefix_of(backend)
        pad = fast.pad_token_id
        size = size_of(backend, pad)
        facts = facts_of(content, fast, size, eos_ids, prefix)
        return cls(
            backend=backend,
            fast=fast,
            eos_ids=eos_ids,
            bos_id=fast.bos_token_id,
            pad_id=pad if pad is not None and pad < size else next(iter(eos_ids), 0),
            size=size,
            prefix=prefix,
            spaced=is_spaced(backend),
            digest=digest_of(facts),
            parts={what: digest_of([facts[name] for name in names]) for what, names in PARTS.items()},
        )

    @property
    def has_template(self) -> bool:
        return self.fast.chat_template is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, nothing added; names of special tokens in it become those tokens.

        Refused: half a surrogate pair, and the name of a padding token that no model has an embedding for.
        """
        try:
            ids = list(self.backend.encode(text, add_special_tokens=False).ids)
        except TypeError as error:
            raise Refused("the text is no valid Unicode (it holds half a surrogate pair)") from error
        if max(ids, default=0) >= self.size:
            raise Refused(f"the text names the padding token {self.fast.pad_token!r}, which no model reads")
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of token ids; special tokens (end of answer and such) are left out unless asked for."""
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        generation: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The conversation as the chat template writes it; ``generation``: up to where an assistant begins.

        Refused where there is no template or it has no place for ``tools``, refuses the conversation or does not end.
        """
        if not self.has_template:
            raise Refused(
                "the tokenizer has no chat template, so it cannot read a conversation: give a bare prompt, "
                "or put a chat_template.jinja beside tokenizer.json"
            )
        if tools and "tools" not in str(self.fast.chat_template):
            raise Refused("tools cannot be shown: the chat template of this family has no place for them")
        try:
            # transformers renders in jinja's sandbox: a template reaches neither attributes nor files.
            return within(RENDER_SECONDS, lambda: self._rendered(messages, generation, tools))
        except Endless as error:
            raise Refused(
                f"the chat template did not end within {RENDER_SECONDS:g} s: put another chat_template.jinja beside "
                "tokenizer.json, or ask for fewer turns"
            ) from error
        except TemplateSyntaxError as error:
            raise Refused(
                f"the chat template cannot be read, line {error.lineno}: {error.message}; mend chat_template.jinja "
                "or the chat_template of tokenizer_config.json"
            ) from error
        except Exception as error:  # a template is somebody's program: it may raise anything
            roles = ", ".join(str(m.get("role")) for m in messages)
            raise Refused(
                f"the chat template refuses this conversation (roles: {roles or 'none'}): {error}"
            ) from error

    def refuse_broken_template(self) -> None:
        """Refused where there is a chat template that is none, whatever it is given."""
        try:
            if self.has_template:
                self.render([{"role": "user", "content": "hello"}])
        except Refused as error:
            if isinstance(error.__cause__, TemplateSyntaxError):
                raise  # another refusal may be of this conversation only

    def _rendered(self, messages: Any, generation: bool, tools: Sequence[Mapping[str, Any]]) -> str:
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": generation}
        turns = [dict(message) for message in messages]
        return str(self.fast.apply_chat_template(turns, tools=list(tools) or None, **options))

    def prompt_ids(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """The exact ids that serving gives a model for a conversation that waits for an answer."""
        return self.encode(self.render(messages, tools=tools))

    def plain_prompt_ids(self, text: str) -> list[int]:
        """The exact ids that serving gives a model for a bare prompt: ``prefix``, then the text."""
        return [*self.prefix, *self.encode(text)]

    def answer_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids a model should say to give the last message, end included (see ``turn_ids``)."""
        return self.turn_ids(messages)[1]

    def turn_ids(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
        """(``prompt_ids(messages[:-1])``, the ids a model should say behind them to give the last message).

        That is what the template writes of the last message behind the prompt, up to the first end token; if
        it writes none, one is appended. Where the template writes the two so differently that the prompt is
        no beginning of the conversation (reasoning put in or cut out), it is the message's content alone.
        Refused where the content holds an end token: serving would stop there.
        """
        content = str(messages[-1]["content"])
        asked, whole = self.render(messages[:-1]), self.render(messages, generation=False)
        text = whole[len(asked) :] if whole.startswith(asked) else content
        self._check_content(content)
        head = self.encode(asked)
        ids = self._going_on(asked, text, head)
        ends = [place for place, token in enumerate(ids) if token in self.eos_ids]
        if ends:
            return head, ids[: ends[0] + 1]
        # The line break a template puts between turns is not for the model to say.
        said = text if content != content.rstrip() else text.rstrip()
        return head, [*self._going_on(asked, said, head), self._end()]

    def plain_answer_ids(self, prompt: str, answer: str) -> list[int]:
        """Ids that a model should say after ``plain_prompt_ids(prompt)`` to give the answer, end included."""
        self._check_content(answer)
        return [*self._going_on(prompt, answer, self.encode(prompt)), self._end()]

    def _going_on(self, before: str, text: str, head: list[int]) -> list[int]:
        """Ids of ``text`` behind ``head``, the ids of ``before``: nothing may mark a beginning where none is."""
        whole = self.encode(before + text)
        if whole[: len(head)] == head:
            return whole[len(head) :]
        return self.encode_on(text)

    def encode_on(self, text: str) -> list[int]:
        """Token ids of a text that goes on behind another: nothing marks a beginning, nothing merges with what was."""
        if self.spaced:
            anchor, anchored = self.encode(_ANCHOR), self.encode(_ANCHOR + text)
            if anchor and anchored[: len(anchor)] == anchor:
                return anchored[len(anchor) :]
        return self.encode(text)

    def _check_content(self, content: str) -> None:
        names = [self.decode([token], skip_special=False).strip() for token in self.eos_ids]
        if not any(name in content or UNFINISHED in name for name in names):
            return  # cheaper than encoding every answer twice
        ends = [token for token in self.encode(content) if token in self.eos_ids]
        if ends:
            name = self.decode(ends[:1], skip_special=False)
            raise Refused(f"the answer holds the end token {name!r} in its text: serving would stop there")

    def _end(self) -> int:
        if not self.eos_ids:
            raise Refused(
                "the tokenizer names no end of an answer: set eos_token in tokenizer_config.json "
                "or eos_token_id in generation_config.json"
            )
        return self.eos_ids[0]
