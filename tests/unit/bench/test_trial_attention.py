"""One trial of an attention kind: it trains, measures, keeps what it found and leaves nothing else; text for it."""

import json
from pathlib import Path

import pytest

from heliostat.bench import attention_text, trial_attention
from heliostat.bench.attention_text import CHOOSE, LEARN, REPORT, articles, documentation, gather, part_of
from heliostat.bench.trial_attention import SIZES, AttentionTrial, kept_at, run, tokenizer_at
from heliostat.errors import Refused

WIKI = "".join(
    f" = Title {n} = \n \n words of article {n} "
    + "and some more of them " * 9
    + "\n \n = = Part = = \n \n rest \n"
    for n in range(6)
)
TOY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
    "vocab_size": 300,
    "max_length": 32,
    "per_device_train_batch_size": 2,
}


@pytest.fixture
def wiki(tmp_path: Path) -> Path:
    path = tmp_path / "wiki.raw"
    path.write_text(WIKI)
    return path


@pytest.fixture
def library(tmp_path: Path) -> Path:
    folder = tmp_path / "lib"
    (folder / "test").mkdir(parents=True)
    long = "What it does, at length. " * 30
    for n in range(40):
        (folder / f"m{n:02}.py").write_text(f'"""{long}{n}"""\n\ndef f():\n    """Of f."""\n')
    (folder / "short.py").write_text('"""Too short."""\n')
    (folder / "broken.py").write_text("def (:\n")
    (folder / "test" / "test_m.py").write_text(f'"""{long}"""\n')
    return folder


def test_a_trial_trains_measures_and_is_kept(
    tmp_path: Path, wiki: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "toy", TOY)
    monkeypatch.setattr(attention_text, "documentation", lambda library: {"a": "some words " * 90})
    attention_text.write(tmp_path / "text", wiki, wiki)
    tokenizer_at(tmp_path, "toy")
    trial = AttentionTrial(kind="affine-fixed", learning_rate=0.01, seed=0, steps=5, size="toy")
    found = run(trial, tmp_path)
    assert found == json.loads(kept_at(tmp_path, trial).read_text())
    assert len(found["loss"]) == len(found["grad_norm"]) == 5 and found["tokens"] == 5 * 2 * 32
    assert 0 < found["report"] < 10 and 0 < found["choose"] < 10 and found["means"]["entropy"] > 0
    assert not list((tmp_path / "bases").iterdir())  # what was to be known of it is known
    monkeypatch.setattr(trial_attention, "values_of", None)  # whoever trains again, fails
    assert run(trial, tmp_path) == found


def test_articles_begin_at_their_titles(wiki: Path) -> None:
    found = articles(wiki)
    assert len(found) == 6 and found[1].startswith("= Title 1 =") and "= = Part = =" in found[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is missing; give a raw wikitext file"), (b"\xff", "not UTF-8"), (b"no title", "has no article")],
)
def test_files_that_are_no_wikitext(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "w.raw"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Refused, match=message):
        articles(path)


def test_documentation_is_what_is_written_for_people(library: Path) -> None:
    found = documentation(library)
    own = {name: text for name, text in found.items() if not name.startswith("topics/")}
    assert len(own) == 40 and list(found) == sorted(found)
    assert own["m03.py"].startswith("m03\nWhat it does") and own["m03.py"].endswith("f\nOf f.")
    assert found == documentation(library)
    assert {part_of(name) for name in found} == {LEARN, CHOOSE, REPORT}


def test_no_text_is_in_two_sets(wiki: Path, library: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.raw"
    other.write_text(WIKI.replace("Title", "Other"))
    sets = gather(wiki, other, library)
    learned = set(sets[LEARN])
    assert (
        sum("= Other" in text for text in sets[CHOOSE])
        == sum("= Other" in text for text in sets[REPORT])
        == 3
    )
    assert not learned & set(sets[CHOOSE]) and not learned & set(sets[REPORT])
    assert not set(sets[CHOOSE]) & set(sets[REPORT])
    assert max(map(len, sets[REPORT])) <= attention_text.LOOKED_AT
