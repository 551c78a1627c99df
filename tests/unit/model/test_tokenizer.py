"""The tokenizer: ids as serving has them, ends of answers, digests, text that streams in whole characters."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat.errors import Refused
from heliostat.model.text_stream import TextStream
from heliostat.model.tokenizer import Tokenizer

Folder = Callable[..., Path]
END, STOP = 4, 2  # <|end|>, </s>
ASKED = [{"role": "user", "content": "hello"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "world"}]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(scope="module")
def growing(tokenizer_folder: Folder) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder(template="growing"))


@pytest.fixture(scope="module")
def spaced(tokenizer_folder: Folder) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder(spaced=True))


def test_import_is_cheap() -> None:
    """The command line may import this file; transformers and torch wait until a folder is read."""
    names = "{'torch', 'transformers', 'tokenizers'}"
    code = f"import sys, heliostat.model.tokenizer; print({names} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


class TestLoad:
    def test_facts(self, growing: Tokenizer) -> None:
        assert (growing.bos_id, growing.pad_id, growing.eos_ids, growing.prefix) == (1, 0, (END,), ())
        assert growing.has_template and not growing.spaced
        assert growing.size == growing.backend.get_vocab_size()

    def test_missing_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(Refused, match="has no tokenizer.json"):
            Tokenizer.load(tmp_path)

    @pytest.mark.parametrize("content", ["{broken", "[]", "{}", '{"model": {"type": "Nonsense"}}'])
    def test_damaged_file_is_refused(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(Refused, match=r"tokenizer\.json|the tokenizer in"):
            Tokenizer.load(tmp_path)

    def test_saved_truncation_and_padding_are_off(self, tokenizer_folder: Folder) -> None:
        folder = tokenizer_folder(template="growing")
        content = json.loads((folder / "tokenizer.json").read_text())
        content["truncation"] = {
            "direction": "Right",
            "max_length": 3,
            "strategy": "LongestFirst",
            "stride": 0,
        }
        content["padding"] = {
            "strategy": {"Fixed": 99},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<pad>",
        }
        plain = Tokenizer.load(folder)
        (folder / "tokenizer.json").write_text(json.dumps(content))
        again = Tokenizer.load(folder)
        text = "hello world, how are you today? 0123456789"
        assert 99 > len(again.encode(text)) > 3
        assert again.encode(text) == plain.encode(text)
        assert again.digest == plain.digest

    @pytest.mark.parametrize(
        ("generation", "eos_ids"),
        [
            (None, (END,)),
            ({}, (END,)),
            ({"eos_token_id": None}, (END,)),
            ({"eos_token_id": STOP}, (END, STOP)),
            ({"eos_token_id": [STOP, END, 0]}, (END, STOP, 0)),
        ],
    )
    def test_ends_of_generation_config(
        self, tokenizer_folder: Folder, generation: object, eos_ids: tuple[int]
    ) -> None:
        assert Tokenizer.load(tokenizer_folder(generation=generation)).eos_ids == eos_ids

    def test_a_wrong_end_is_refused(self, tokenizer_folder: Folder) -> None:
        with pytest.raises(Refused, match=r"eos_token_id is \['</s>'\]"):
            Tokenizer.load(tokenizer_folder(generation={"eos_token_id": ["</s>"]}))

    def test_padding_token_beyond_the_vocabulary(self, tokenizer_folder: Folder) -> None:
        """A [PAD] that only tokenizer_config.json knows gets an id that no model has an embedding for."""
        usual = Tokenizer.load(tokenizer_folder())
        padded = Tokenizer.load(tokenizer_folder(config={"eos_token": "<|end|>", "pad_token": "[PAD]"}))
        assert padded.size == usual.size
        assert padded.digest == usual.digest
        assert padded.pad_id == END
        with pytest.raises(Refused, match=r"\[PAD\]"):
            padded.encode("say [PAD]")


class TestIds:
    @given(text=TEXT)
    def test_byte_level_round_trip(self, growing: Tokenizer, text: str) -> None:
        assert growing.decode(growing.encode(text), skip_special=False) == text

    def test_special_tokens_are_left_out_of_text(self, growing: Tokenizer) -> None:
        ids = [*growing.encode("hello"), END]
        assert growing.decode(ids) == "hello"
        assert growing.decode(ids, skip_special=False) == "hello<|end|>"

    def test_half_a_surrogate_is_refused(self, growing: Tokenizer) -> None:
        with pytest.raises(Refused, match="surrogate"):
            growing.encode("a\ud800")

    def test_bare_prompt_gets_the_beginning_but_no_end(self, tokenizer_folder: Folder) -> None:
        tokenizer = Tokenizer.load(tokenizer_folder(adds_bos=True))
        assert tokenizer.prefix == (1,)
        assert tokenizer.plain_prompt_ids("hello") == [1, *tokenizer.encode("hello")]

    def test_prompt_is_the_rendered_conversation(self, growing: Tokenizer) -> None:
        rendered = growing.render(ASKED)
        assert rendered == "<|start|>user\nhello<|end|>\n<|start|>assistant\n"
        assert growing.prompt_ids(ASKED) == growing.encode(rendered)
        assert growing.prompt_ids(ASKED)[0] == 3

    def test_same_ids_as_transformers(self, tokenizer_folder: Folder) -> None:
        from transformers import AutoTokenizer

        folder = tokenizer_folder(template="growing", adds_bos=True)
        ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
        asked = theirs.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
        assert ours.prompt_ids(ASKED) == asked
        assert [*ours.plain_prompt_ids("how are you"), STOP] == theirs("how are you")["input_ids"]

    def test_no_template_is_refused(self, spaced: Tokenizer) -> None:
        with pytest.raises(Refused, match="no chat template"):
            spaced.prompt_ids(ASKED)

    def test_a_template_may_refuse(self, tokenizer_folder: Folder) -> None:
        tokenizer = Tokenizer.load(tokenizer_folder(template="picky"))
        with pytest.raises(Refused, match=r"roles: system, user\): no system turn please"):
            tokenizer.prompt_ids([{"role": "system", "content": "x"}, *ASKED])

    @pytest.mark.parametrize(
        "template", ["{% for %}", "{{ nothing.at.all }}", "{{ ''.__class__.__mro__[1] }}"]
    )
    def test_a_broken_or_hostile_template_is_refused(self, tokenizer_folder: Folder, template: str) -> None:
        tokenizer = Tokenizer.load(tokenizer_folder(template=template))
        with pytest.raises(Refused, match="the chat template (refuses|cannot be read, line 1)"):
            tokenizer.prompt_ids(ASKED)


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


class TestTimeLimit:
    @pytest.mark.parametrize("main", [True, False])
    def test_an_endless_template_is_refused(
        self, tokenizer_folder: Folder, monkeypatch: pytest.MonkeyPatch, main: bool
    ) -> None:
        monkeypatch.setattr("heliostat.model.tokenizer.RENDER_SECONDS", 0.2)
        endless = Tokenizer.load(
            tokenizer_folder(template="{% if messages|length > 1 %}" + ENDLESS + "{% endif %}ok")
        )
        refused: list[str] = []

        def slowly(*_: object) -> str:
            time.sleep(1)
            return ""

        # What the thread left behind goes on working, so it is given less to do.
        monkeypatch.setattr(Tokenizer, "_rendered", Tokenizer._rendered if main else slowly)

        def ask() -> None:
            with pytest.raises(Refused, match=r"the chat template did not end within 0.2 s"):
                endless.render([{"role": "user", "content": "a"}] * 2)
            refused.append("yes")

        if main:
            ask()
            assert endless.render([{"role": "user", "content": "a"}]) == "ok"  # and the next one is heard
        else:
            thread = threading.Thread(target=ask)
            thread.start()
            thread.join()
        assert refused

    def test_alarms_of_others_are_left_as_they_were(self, growing: Tokenizer) -> None:
        def mine(signum: int, frame: object) -> None: ...

        before = signal.signal(signal.SIGALRM, mine)
        try:
            signal.setitimer(signal.ITIMER_REAL, 1000)
            growing.render([{"role": "user", "content": "a"}])
            assert signal.getsignal(signal.SIGALRM) is mine
            assert signal.getitimer(signal.ITIMER_REAL)[0] > 900
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def test_other_threads_render_and_refuse_alike(
        self, growing: Tokenizer, tokenizer_folder: Folder
    ) -> None:
        picky = Tokenizer.load(tokenizer_folder(template="picky"))
        with ThreadPoolExecutor(1) as pool:
            said = pool.submit(growing.render, [{"role": "user", "content": "a"}]).result()
            failed = pool.submit(picky.render, [{"role": "system", "content": "a"}])
            assert said == growing.render([{"role": "user", "content": "a"}])
            with pytest.raises(Refused, match="no system turn please"):
                failed.result()


class TestAnswers:
    def test_the_end_belongs_to_the_answer(self, growing: Tokenizer) -> None:
        assert growing.answer_ids(ANSWERED) == [*growing.encode("world"), END]

    def test_an_end_is_appended_where_the_template_writes_none(self, tokenizer_folder: Folder) -> None:
        tokenizer = Tokenizer.load(tokenizer_folder(template="endless"))
        answer = tokenizer.answer_ids(ANSWERED)
        assert answer[-1] == END
        assert tokenizer.decode(answer) == "world"

    def test_white_space_of_the_answer_itself_is_kept(self, tokenizer_folder: Folder) -> None:
        tokenizer = Tokenizer.load(tokenizer_folder(template="endless"))
        answer = tokenizer.answer_ids([*ASKED, {"role": "assistant", "content": "world\n"}])
        assert tokenizer.decode(answer).startswith("world\n")

    def test_a_prompt_that_is_no_beginning(self, tokenizer_folder: Folder) -> None:
        tokenizer = Tokenizer.load(tokenizer_folder(template="thinking"))
        assert tokenizer.answer_ids(ANSWERED) == [*tokenizer.encode("world"), END]

    def test_an_end_inside_an_answer_is_refused(self, growing: Tokenizer) -> None:
        bad = [*ASKED, {"role": "assistant", "content": "wor<|end|>ld"}]
        with pytest.raises(Refused, match=r"holds the end token '<\|end\|>'"):
            growing.answer_ids(bad)
        with pytest.raises(Refused, match="serving would stop"):
            growing.plain_answer_ids("hello", "<|end|>")

    def test_a_tokenizer_without_end_is_refused(self, tokenizer_folder: Folder) -> None:
        tokenizer = Tokenizer.load(tokenizer_folder(config={}))
        assert tokenizer.eos_ids == ()
        with pytest.raises(Refused, match="names no end"):
            tokenizer.plain_answer_ids("a", "b")

    @given(prompt=TEXT, answer=TEXT)
    def test_prompt_and_answer_are_the_whole_text(self, growing: Tokenizer, prompt: str, answer: str) -> None:
        ids = growing.plain_prompt_ids(prompt) + growing.plain_answer_ids(prompt, answer)
        assert growing.decode(ids) == prompt + answer
        assert ids[-1] == END

    @pytest.mark.parametrize(
        ("prompt", "answer"),
        [("hello", "world"), ("hello", " world"), ("2 and ", "3"), ("a ", " b"), ("worl", "d")],
    )
    def test_no_space_is_put_into_an_answer(self, spaced: Tokenizer, prompt: str, answer: str) -> None:
        ids = spaced.plain_prompt_ids(prompt) + spaced.plain_answer_ids(prompt, answer)
        assert spaced.spaced
        assert spaced.decode(ids) == prompt + answer


class TestDigest:
    def test_the_same_however_it_was_saved(self, tokenizer_folder: Folder, tmp_path: Path) -> None:
        from transformers import AutoTokenizer

        folder = tokenizer_folder(template="growing")
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
        old = json.loads((folder / "tokenizer.json").read_text())
        assert isinstance(old["model"]["merges"][0], list)
        old["model"]["merges"] = [" ".join(merge) for merge in old["model"]["merges"]]
        del old["model"]["ignore_merges"]
        digest = Tokenizer.load(folder).digest
        (folder / "tokenizer.json").write_text(json.dumps(old, indent=7))
        assert Tokenizer.load(folder).digest == Tokenizer.load(tmp_path).digest == digest

    def test_another_one_where_ids_may_differ(self, tokenizer_folder: Folder) -> None:
        folders = [
            tokenizer_folder(),
            tokenizer_folder(template="growing"),
            tokenizer_folder(template="endless"),
            tokenizer_folder(adds_bos=True),
            tokenizer_folder(generation={"eos_token_id": STOP}),
            tokenizer_folder(config={"eos_token": "</s>"}),
            tokenizer_folder(spaced=True),
            tokenizer_folder(config={"eos_token": "<|end|>", "additional_special_tokens": ["<call>"]}),
        ]
        digests = [Tokenizer.load(folder).digest for folder in folders]
        assert len(set(digests)) == len(digests)
        assert Tokenizer.load(tokenizer_folder()).digest == digests[0]


class TestTextStream:
    @settings(max_examples=60)
    @given(text=TEXT, cuts=st.lists(st.integers(1, 5), max_size=8))
    def test_pieces_join_to_the_whole(self, growing: Tokenizer, text: str, cuts: list[int]) -> None:
        ids = growing.encode(text * 3)
        stream, pieces = TextStream(growing), []
        for size in [*cuts, len(ids)]:
            pieces.append(stream.push(ids[:size]))
            ids = ids[size:]
        whole = growing.decode(growing.encode(text * 3))
        assert "".join([*pieces, stream.finish()]) == whole

    @settings(max_examples=60)
    @given(text=st.text("aé中😀 ", min_size=1, max_size=60))
    def test_no_piece_breaks_a_character(self, growing: Tokenizer, spaced: Tokenizer, text: str) -> None:
        for tokenizer in (growing, spaced):
            stream = TextStream(tokenizer)
            ids = tokenizer.encode(text)
            pieces = [stream.push([token]) for token in ids]
            assert "\ufffd" not in "".join(pieces)
            assert "".join(pieces) == tokenizer.decode(ids)
            assert stream.finish() == ""

    def test_a_character_never_finished_comes_at_the_end(self, growing: Tokenizer) -> None:
        stream = TextStream(growing)
        ids = growing.encode("a🜁")[:-1]
        assert [stream.push([token]) for token in ids] == ["a", *[""] * (len(ids) - 1)]
        assert stream.finish() == "\ufffd"

    def test_special_tokens_between_words(self, spaced: Tokenizer) -> None:
        word = spaced.encode("hello")
        ids = [*word, *[3] * 50, *word]
        stream = TextStream(spaced)
        assert "".join(stream.push([token]) for token in ids) == spaced.decode(ids) == "hello hello"

    @settings(max_examples=40)
    @given(data=st.data())
    def test_any_ids_at_all(self, growing: Tokenizer, data: st.DataObject) -> None:
        """An untrained model says anything: broken bytes too come out as they decode."""
        ids = data.draw(st.lists(st.integers(0, growing.size - 1), max_size=120))
        stream = TextStream(growing)
        pieces = [stream.push([token]) for token in ids]
        assert "".join([*pieces, stream.finish()]) == growing.decode(ids)
