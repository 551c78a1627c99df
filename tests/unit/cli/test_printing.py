"""Tables: for a terminal, and for a file or a pipe."""

import pytest

from heliostat.cli.printing import print_table


def printed(capsys: pytest.CaptureFixture[str]) -> set[str]:
    names = [letter * 60 for letter in "abc"]
    print_table([names], title="T", columns=("one", "two", "three"))
    return set(names) & set(capsys.readouterr().out.split())


def test_names_stay_whole_where_no_terminal_reads_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert len(printed(capsys)) == 3


def test_a_width_that_was_asked_for_is_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert not printed(capsys)
