"""Small tokenizers as Hugging Face folders, for tests that need text turned into ids."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

# Nothing here is timed: a busy neighbour is no failure.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

SPECIAL = ["<pad>", "<s>", "</s>", "<|start|>", "<|end|>"]
TEXTS = [
    "hello world, how are you today?",
    "the sum of 2 and 3 is 5.",
    "user assistant system\n",
    "grüße 中文 😀",
]

TEMPLATES = {
    # Earlier turns stay as they were: every prompt begins with the prompt and the answer before it.
    "growing": "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}",
    # Earlier answers lose their thoughts, as the templates of reasoning models do.
    "stripping": "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{{ m.content.split('=>')[-1] if m.role == 'assistant' and not loop.last else m.content }}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}",
    # Nothing ends an answer but the next turn.
    "endless": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    # What waits for an answer is no beginning of what has one.
    "thinking": "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n<think>\n{% endif %}",
    "picky": "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn please') }}{% endif %}"
    "{{ messages[0].content }}",
}

Folder = Callable[..., Path]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Makes a folder with a tokenizer: byte-level BPE, or ``spaced`` as SentencePiece's."""

    def make(
        *,
        template: str | None = None,
        spaced: bool = False,
        adds_bos: bool = False,
        config: dict[str, Any] | None = None,
        generation: Any = None,
    ) -> Path:
        folder = tmp_path_factory.mktemp("tokenizer")
        tokenizer = _spaced() if spaced else _byte_level()
        if adds_bos:
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
            )
        tokenizer.save(str(folder / "tokenizer.json"))
        facts = (
            {"bos_token": "<s>", "eos_token": "<|end|>", "pad_token": "<pad>"} if config is None else config
        )
        (folder / "tokenizer_config.json").write_text(json.dumps(facts))
        if template is not None:
            (folder / "chat_template.jinja").write_text(TEMPLATES.get(template, template))
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation))
        return folder

    return make


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, pre_tokenizers.ByteLevel.alphabet())


def _spaced() -> Tokenizer:
    """Puts a space before every text, and spells rare characters in bytes."""
    letters = sorted({c for text in TEXTS[:3] for c in text if c not in " \n"} | {"▁"})
    tokens = [*SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), *letters, "ld"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    model = models.BPE(
        vocab=vocabulary, merges=[("l", "d")], byte_fallback=True, unk_token="<s>", fuse_unk=False
    )
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _trained(tokenizer: Tokenizer, alphabet: list[str]) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer
