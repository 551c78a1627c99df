"""The tokenizer recipe: 1024 entries, lossless, digits apart; transformers loads the same."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from heliostat.tasks import TASKS
from heliostat.tasks.corpus import documents, rendered
from heliostat.tasks.tokenizer import SPECIAL, save, train


@pytest.fixture(scope="module")
def loaded(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    save(tokenizer, folder)
    return AutoTokenizer.from_pretrained(folder)


def test_size_and_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 1024
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == [0, 1, 2, 3, 4]


def test_building_it_twice_gives_the_same_bytes() -> None:
    assert train(n=2000).to_str() == train(n=2000).to_str()


@given(st.text().filter(lambda text: "<|" not in text))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@given(st.text(max_size=5), st.integers(0, 10**9), st.text(max_size=5))
def test_every_digit_is_a_token(tokenizer: Tokenizer, before: str, number: int, after: str) -> None:
    digits = [
        token
        for token in tokenizer.encode(f"{before} {number} {after}").tokens
        if any(c in "0123456789" for c in token)
    ]
    assert all(len(token) == 1 for token in digits)


def test_transformers_loads_it_with_the_same_ids(
    tokenizer: Tokenizer, loaded: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    texts = [item["prompt"] for task in TASKS.values() for item in task.test(0, 100)]
    texts += [rendered(document) for document in documents(1, 100)] + ["naïve café ☕ 12", "a  b\n\tc", ""]
    for text in texts:
        assert loaded.encode(text) == tokenizer.encode(text).ids
        assert loaded.decode(loaded.encode(text)) == text
    assert (loaded.eos_token, loaded.pad_token, loaded.bos_token) == ("<|end|>", "<|pad|>", None)
    assert loaded.model_max_length == 256


def test_the_template_is_the_corpus_layout_and_turns_are_prefixes(loaded: PreTrainedTokenizerBase) -> None:
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "see you"},
    ]
    whole = loaded.apply_chat_template(turns, tokenize=False)
    assert whole == rendered({"messages": turns})
    assert isinstance(whole, str)
    for k in range(1, len(turns)):
        part = loaded.apply_chat_template(turns[:k], tokenize=False)
        assert isinstance(part, str)
        assert whole.startswith(part)
        if turns[k - 1]["role"] == "user":
            asked = loaded.apply_chat_template(turns[:k], tokenize=False, add_generation_prompt=True)
            assert asked == part + "<|assistant|>" and whole.startswith(asked)


def test_an_unknown_role_is_refused_by_the_template(loaded: PreTrainedTokenizerBase) -> None:
    with pytest.raises(Exception, match="unknown role tool"):
        loaded.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)
