"""`chat`: turns add up, members hand the conversation on, nothing a person types ends it by mistake."""

from pathlib import Path

import pytest

from heliostat.cli.chatting import Chat
from heliostat.engine.request import Sampling
from heliostat.llm import LLM
from tests.unit.cli.conftest import Heliostat


@pytest.fixture
def chat(tiny_family: Path) -> Chat:
    talk = Chat(tiny_family, Sampling(max_tokens=6), {"dtype": "float32"})
    talk.switch("math")
    return talk


def test_a_piped_conversation_ends_with_its_input(heliostat: Heliostat, tiny_family: Path) -> None:
    typed = "add 1 and 2\n/member plan\nadd 2 and 2\n"
    result = heliostat("chat", tiny_family, "--member", "math", "--max-tokens", 4, typed=typed)
    assert "math listens" in result.stderr and "plan goes on" in result.stderr
    assert len(result.stdout.splitlines()) >= 2


def test_the_conversation_survives_a_change_of_member(chat: Chat) -> None:
    assert chat.obey("add 1 and 2") and chat.obey("/member plan")
    before = list(chat.turns)
    assert chat.obey("and now?")
    assert chat.turns[:2] == before and [t["role"] for t in chat.turns] == ["user", "assistant"] * 2
    asked = chat.turns[:3]
    llm = LLM(chat.family, members=["plan"], dtype="float32")
    assert "".join(llm.stream(asked, member="plan", max_tokens=6)) == chat.turns[3]["content"]


def test_reset_forgets_and_quit_leaves(chat: Chat) -> None:
    chat.obey("add 1 and 2")
    assert chat.obey("/reset") and chat.turns == []
    assert not chat.obey("/quit")


def test_help_lists_commands_and_names(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.obey("/help") and chat.turns == []
    told = capsys.readouterr().err
    for said in ("/member NAME", "/reset", "/quit", "math", "plan.own"):
        assert said in told


def test_mistakes_lose_nothing(heliostat: Heliostat, tiny_family: Path) -> None:
    typed = "/mmber x\n/member nobody\n/member\n" + "word " * 300 + "\n\nadd 1 and 2\n/quit\nnever read\n"
    result = heliostat("chat", tiny_family, "--max-tokens", 3, typed=typed)
    for said in ("no command '/mmber'", "no member 'nobody'", "/member needs a name: solo", "256"):
        assert said in result.stderr
    assert len(result.stdout.splitlines()) == 1


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(*_: object, **__: object):  # type: ignore[no-untyped-def]
        yield "half an"
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.llm, "stream", stream)
    assert chat.obey("go")
    assert chat.turns[-1] == {"role": "assistant", "content": "half an"}


def test_a_family_without_a_chat_template_is_refused(
    heliostat: Heliostat, tiny_base: Path, tmp_path: Path
) -> None:
    import shutil

    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    (base / "chat_template.jinja").unlink()
    heliostat("init", tmp_path / "fam", "--base", base)
    assert "no chat template" in heliostat("chat", tmp_path / "fam", typed="hi\n", status=2).stderr


def test_a_device_that_is_not_there_is_refused_by_chat_and_generate(
    heliostat: Heliostat, tiny_family: Path
) -> None:
    for words in (("chat", tiny_family), ("generate", tiny_family, "--prompt", "add 1 and 2")):
        result = heliostat(*words, "--device", "cuda:99", status=2)
        assert "device is 'cuda:99'; torch sees here: cpu" in result.stderr
        assert heliostat(*words, "--device", "cpu", "--max-tokens", 2, typed="hello\n").exit_code == 0
