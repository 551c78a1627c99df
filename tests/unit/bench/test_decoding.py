"""Decoding side by side: who is asked how often, what is timed, what is said of it."""

from pathlib import Path
from typing import Any

import pytest

from heliostat.bench import decode
from heliostat.bench.comparing import Silent
from heliostat.bench.decoded import Case, cases, decoded
from heliostat.bench.decoded_page import cells, write_docs, write_report
from heliostat.bench.decoding import Decoding, run_all
from heliostat.bench.systems import SYSTEMS
from heliostat.errors import Refused

TINY = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 32}
LINES = tuple(SYSTEMS[name] for name in ("independent", "multilora", "sun"))


@pytest.mark.parametrize(
    ("case", "counts"),
    [
        (Case(4, 2), [2, 2, 2, 2]),
        (Case(4, 1, "zipf:1"), [2, 1, 1, 0]),
        (Case(3, 4, "zipf:0"), [4, 4, 4]),
        (Case(2, 1, "zipf:10"), [2, 0]),
    ],
)
def test_requests_fall_on_members_as_popularity_has_it(case: Case, counts: list[int]) -> None:
    assert case.counts() == counts and sum(counts) == case.members * case.running


def test_there_is_always_a_case_where_sharing_gains_little() -> None:
    made = cases([4, 8], ["uniform", "zipf:1.2"], [1, 4])
    assert len(made) == 2 * 2 * 2 + 3 and len({case.name for case in made}) == len(made)
    less = [(case.members, case.running, case.prompt) for case in made if case.less]
    assert less == [(1, 4, 224), (4, 1, 1536), (4, 16, 224)]
    assert len(cases([1], ["uniform"], [64])) == 2, "none twice"


def test_too_many_requests_at_once_are_refused_with_their_number() -> None:
    with pytest.raises(Refused, match="320 requests at once; allowed is up to 256"):
        cases([64], ["uniform"], [1, 5])


def points(*seconds: float) -> list[dict[str, Any]]:
    return [{"requests": 4, "seconds": [each] * 3, "prefill": 0.5} for each in seconds]


def test_ratios_are_of_the_same_round() -> None:
    found = decoded(
        Case(4, 1),
        ["independent", "sun"],
        {"independent": points(0.4, 0.8, 0.4, 0.8, 0.4), "sun": points(0.1, 0.2, 0.1, 0.2, 0.1, 9.0)},
    )
    assert found is not None
    own = found["systems"]["sun"]
    assert own["ratio"]["value"] == pytest.approx(4.0) and own["median"] == pytest.approx(40.0)
    assert own["tpot"] == 0.1 and len(own["tokens_a_second"]) == 5
    assert decoded(Case(4, 1), ["independent", "sun"], {"independent": points(1.0), "sun": []}) is None


class Stopping(Silent):
    """Ctrl-C at a point."""

    def __init__(self, at: int) -> None:
        self.left = at

    def point(self, name: str) -> None:
        """Until then all is well."""
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1


def test_all_systems_are_timed_and_what_is_there_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "SHAPES", {"tiny": TINY})
    monkeypatch.setattr("heliostat.bench.stand.SHAPES", {"tiny": TINY})
    made = (Case(2, 2, prompt=20, steps=4), Case(1, 1, prompt=20, steps=4, less=True))
    asked = Decoding(LINES, made, "tiny", 2, 0)
    part = run_all(asked, tmp_path, command="x", tell=Stopping(4))
    assert part["stopped"] and len(part["cases"]) == 1
    results = run_all(asked, tmp_path, command="heliostat bench decode", tell=Silent())
    assert not results["stopped"] and len(list((tmp_path / "points").iterdir())) == 2 * 2 * 3
    for found in results["cases"]:
        assert list(found["systems"]) == ["independent", "multilora", "sun"]
    rows = cells(results)[1]
    assert len(rows) == 6 and rows[0][4] == "1" and rows[2][4] == "too few: 2 pairs of 5"
    assert "less to gain" in rows[3][0]
    assert write_report(tmp_path / "report.html", results).read_text().count("<svg") == 2
    text = write_docs(tmp_path / "docs", "decode-members", results)[1].read_text()
    assert "| sun |" in text and "heliostat bench decode" in text and "A100" in text


def test_what_is_timed_is_one_token_for_every_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import heliostat.bench.decoding as decoding
    from heliostat.bench.stand import Stand

    monkeypatch.setattr(decode, "SHAPES", {"tiny": TINY})
    monkeypatch.setattr("heliostat.bench.stand.SHAPES", {"tiny": TINY})
    found = decoding.timed(Stand("tiny"), SYSTEMS["sun"], Case(2, 2, prompt=20, steps=5), seed=0)
    # The first token of each answer is the prompt's reader's.
    assert found.requests == 4 and len(found.seconds) == 5 and found.prefill > 0
