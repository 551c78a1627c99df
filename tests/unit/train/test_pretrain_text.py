"""Text for a new base: what documents are, what is held out, a tokenizer that is always the same, bad files by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from heliostat.errors import Refused
from heliostat.model.tokenizer import Tokenizer
from heliostat.train.pretrain_recipe import PretrainRecipe, SettledPretraining
from heliostat.train.pretrain_text import paragraphs, read_rows, tokenizer_folder
from heliostat.train.spellings import make_recipe

SUMS = "\n\n".join(f"{a} and {b} is {a + b}" for a in range(12) for b in range(5))
ODD = "caf\u00e9 \u4f60\u597d \U0001f52d\ttabs\nlines  and   spaces, 12345"


def asked(**values: Any) -> PretrainRecipe:
    return make_recipe(PretrainRecipe, {"output_dir": "out", **values})


def settled(*data: Path, **options: Any) -> SettledPretraining:
    facts = {"data": [str(p) for p in data], "max_length": 16, "vocab_size": 300}
    return asked(**{**facts, **options}).resolve(bf16=False)


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_tokenizer_is_the_same_every_time_and_loses_nothing(tmp_path: Path) -> None:
    text = written(tmp_path / "sums.txt", SUMS)
    folders = [tokenizer_folder(settled(text), tmp_path / run) for run in ("one", "two")]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    tokenizer = Tokenizer.load(folders[0])
    assert tokenizer.size <= 300 and tokenizer.decode(tokenizer.encode(ODD)) == ODD
    assert len(tokenizer.encode("12 and 12")) < len("12 and 12")  # it has learned
    said = tokenizer.render([{"role": "user", "content": "hello"}])
    assert "hello" in said and said.endswith("<|assistant|>")
    assert tokenizer_folder(settled(text), tmp_path / "one") == folders[0]  # kept, not trained again


def test_a_document_is_a_paragraph_or_a_file(tmp_path: Path) -> None:
    text = written(tmp_path / "a.txt", "one two three\n \t\nfour five six\r\n\r\n\nseven eight nine" * 9)
    assert paragraphs(text)[:2] == ["one two three", "four five six"]
    tokenizer = Tokenizer.load(tokenizer_folder(settled(text), tmp_path / "run"))
    told: list[str] = []
    by_paragraph, _ = read_rows(settled(text), tokenizer, told.append)
    whole, _ = read_rows(settled(text, document="file"), tokenizer, told.append)
    assert len(by_paragraph.documents.unique()) > 10 and len(whole.documents.unique()) == 1
    assert "1 documents" in told[1] and "held out" in told[0]


def test_a_share_of_every_file_is_held_out(tmp_path: Path) -> None:
    one, two = written(tmp_path / "one.txt", SUMS), written(tmp_path / "two.txt", SUMS.replace("is", "was"))
    tokenizer = Tokenizer.load(tokenizer_folder(settled(one, two), tmp_path / "run"))
    rows, held_out = read_rows(settled(one, two, eval_share=0.2), tokenizer, lambda line: None)
    said = tokenizer.decode(held_out.ids.flatten().tolist())
    assert "0 and 0 is 0" in said and "0 and 0 was 0" in said
    assert held_out.ids.numel() / rows.ids.numel() == pytest.approx(0.25, rel=0.2)
    _, given = read_rows(settled(one, eval_data=str(two)), tokenizer, lambda line: None)
    assert "is" not in tokenizer.decode(given.ids.flatten().tolist())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good\nand h\xe9re", r"a\.txt:2: not UTF-8: byte 0xe9 at position 10"),
        ("a.txt", b"", r"a\.txt holds no text"),
        ("a.txt", b" \n\n", r"a\.txt holds no text"),
        ("a.jsonl", b"", r"a\.jsonl is empty"),
        ("a.jsonl", b'{"text": "one two"}\n{"title": "x"}\n', r"a\.jsonl:2: .*text"),
        ("a.jsonl", b'{"text": "one two"}\n{"text": ""}\n', r"a\.jsonl:2: .*empty"),
        ("a.jsonl", b'{"text": "h\xe9"}\n', r"a\.jsonl:1: not UTF-8"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl:1: .*text"),
        ("a.jsonl", b'{"body": "a text"}\n', r"a\.jsonl:1: .*'body'"),
    ],
)
def test_files_that_cannot_be_read_are_named_with_their_line(
    tmp_path: Path, tiny_base: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(Refused, match=message):
        read_rows(settled(path), Tokenizer.load(tiny_base), lambda line: None)
    with pytest.raises(Refused, match=message):
        tokenizer_folder(settled(path), tmp_path / "run")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokenizer": {"train": {}}}, "it must be a folder, or {train: {vocab_size: N}}"),
        (
            {"tokenizer": {"train": {"vocab_size": 300}}, "vocab_size": 400},
            "vocab_size is 400.*300: keep one",
        ),
        ({"tokenizer": {"train": {"vocab_size": 300}}, "teacher": "t"}, "leave tokenizer out"),
        ({"distill_weight": 0.5}, "distill_weight: for a teacher only"),
        ({"n": "fixed"}, "n: for affine attention only, and attention is softmax"),
        ({"attention": "gated", "alpha": "constant"}, "alpha: for affine attention only"),
        ({"attention": "affine", "n": "fixed"}, "say max_position_embeddings 256, or n visible"),
    ],
)
def test_wishes_that_do_not_fit_together(values: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        asked(**values)


def test_a_tokenizer_may_be_asked_for_in_one_place() -> None:
    recipe = asked(tokenizer={"train": {"vocab_size": 321}})
    assert recipe.vocab_size == 321 and recipe.tokenizer is None


def test_auto_is_settled_by_the_kind_and_the_teacher() -> None:
    plain = asked().resolve(bf16=False)
    assert (plain.n, plain.alpha, plain.distill_weight, plain.distill_temperature) == (None,) * 4
    affine = asked(attention="affine", teacher="t").resolve(bf16=False)
    assert (affine.n, affine.alpha) == ("visible", "learned")
    assert (affine.distill_weight, affine.distill_temperature) == (0.5, 1.0)
    fixed = asked(attention="affine", n="fixed", max_position_embeddings=256)
    assert fixed.resolve(bf16=False).attention_kind.length == 256


def test_conversations_train_a_tokenizer_without_their_marks(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"prompt": "hello hello", "completion": "there"}) + "\n")
    tokenizer = Tokenizer.load(tokenizer_folder(settled(path), tmp_path / "run"))
    assert tokenizer.decode(tokenizer.encode("hello there")) == "hello there"
