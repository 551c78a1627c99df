"""Examples hold serving's ids, each answer once and whole; batches depend on the seed and the step alone."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat.errors import Refused
from heliostat.model.tokenizer import Tokenizer
from heliostat.train.data import (
    Batches,
    Example,
    TooLong,
    answered_by,
    document_ids,
    encode,
    question_ids,
    read_examples,
)
from heliostat.train.formats import Record, Turn

Folder = Callable[..., Path]
END = 4  # <|end|>
LONG = 10_000
ASKED = (Turn("user", "hello"),)
TWO_TURNS = (*ASKED, Turn("assistant", "how=>world"), Turn("user", "and 2"), Turn("assistant", "so=>3."))


@pytest.fixture(scope="module")
def growing(tokenizer_folder: Folder) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder(template="growing"))


@pytest.fixture(scope="module")
def stripping(tokenizer_folder: Folder) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder(template="stripping"))


@pytest.fixture(scope="module")
def bare(tokenizer_folder: Folder) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder(adds_bos=True))


def answers(example: Example, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(example.ids[start:stop], skip_special=False) for start, stop in example.answers]


def messages(turns: tuple[Turn, ...]) -> list[dict[str, str]]:
    return [turn.message for turn in turns]


class TestEncode:
    def test_turns_that_go_on_are_one_example(self, growing: Tokenizer) -> None:
        (example,) = encode(Record(TWO_TURNS), growing, max_length=LONG)
        assert answers(example, growing) == ["how=>world<|end|>", "so=>3.<|end|>"]
        for place, (start, _) in zip((1, 3), example.answers, strict=True):
            assert list(example.ids[:start]) == growing.prompt_ids(messages(TWO_TURNS[:place]))
        assert example.answers[-1][1] == len(example.ids)

    def test_turns_that_a_template_rewrites_stand_alone(self, stripping: Tokenizer) -> None:
        """Serving gives the second turn a history without thoughts, so training must do so too."""
        first, second = encode(Record(TWO_TURNS), stripping, max_length=LONG)
        assert answers(first, stripping) == ["how=>world<|end|>"]
        assert answers(second, stripping) == ["so=>3.<|end|>"]
        assert list(second.ids[: second.answers[0][0]]) == stripping.prompt_ids(messages(TWO_TURNS[:3]))
        assert "how" not in stripping.decode(second.ids)

    def test_an_appended_end_is_no_history(self, tokenizer_folder: Folder) -> None:
        endless = Tokenizer.load(tokenizer_folder(template="endless"))
        first, second = encode(Record(TWO_TURNS), endless, max_length=LONG)
        assert answers(first, endless) == ["how=>world<|end|>"]
        assert END not in second.ids[:-1]

    def test_context_is_not_learned(self, growing: Tokenizer) -> None:
        turns = (TWO_TURNS[0], Turn("assistant", "how=>world", learned=False), *TWO_TURNS[2:])
        (example,) = encode(Record(turns), growing, max_length=LONG)
        assert answers(example, growing) == ["so=>3.<|end|>"]
        assert "how=>world" in growing.decode(example.ids)

    def test_prompt_and_completion_are_a_conversation_where_there_is_a_template(
        self, growing: Tokenizer
    ) -> None:
        turns = (*ASKED, Turn("assistant", "world"))
        assert encode(Record(turns, plain=True), growing, max_length=LONG) == encode(
            Record(turns), growing, max_length=LONG
        )

    def test_prompt_and_completion_bare(self, bare: Tokenizer) -> None:
        (example,) = encode(Record((*ASKED, Turn("assistant", " world")), plain=True), bare, max_length=LONG)
        assert (
            list(example.ids[: example.answers[0][0]])
            == bare.plain_prompt_ids("hello")
            == [1, *bare.encode("hello")]
        )
        assert answers(example, bare) == [" world<|end|>"]

    def test_a_conversation_needs_a_template(self, bare: Tokenizer) -> None:
        with pytest.raises(Refused, match="no chat template"):
            encode(Record(TWO_TURNS), bare, max_length=LONG)

    def test_text_is_learned_from_its_second_token(self, growing: Tokenizer) -> None:
        (example,) = encode(Record(text="hello world"), growing, max_length=LONG)
        assert list(example.ids) == [*growing.encode("hello world"), END]
        assert example.answers == ((1, len(example.ids)),)

    def test_longer_than_the_limit_is_refused_with_both_numbers(self, growing: Tokenizer) -> None:
        (example,) = encode(Record(TWO_TURNS), growing, max_length=LONG)
        length = len(example.ids)
        assert encode(Record(TWO_TURNS), growing, max_length=length) == [example]
        with pytest.raises(
            TooLong, match=rf"{length} tokens with its prompt, more than max_length {length - 1} "
        ):
            encode(Record(TWO_TURNS), growing, max_length=length - 1)

    @settings(max_examples=50)
    @given(contents=st.lists(st.text("ab =>中\n", min_size=1, max_size=12), min_size=1, max_size=4))
    def test_every_answer_once_behind_its_serving_prompt(
        self, growing: Tokenizer, stripping: Tokenizer, contents: list[str]
    ) -> None:
        turns = tuple(Turn(role, text) for text in contents for role in ("user", "assistant"))
        for tokenizer in (growing, stripping):
            examples = encode(Record(turns), tokenizer, max_length=LONG)
            spans = [(e, *span) for e in examples for span in e.answers]
            assert len(spans) == len(contents)
            for number, (example, start, stop) in enumerate(spans):
                assert list(example.ids[:start]) == tokenizer.prompt_ids(messages(turns[: 2 * number + 1]))
                assert (
                    tokenizer.decode(example.ids[start:stop], skip_special=False)
                    == contents[number] + "<|end|>"
                )

    def test_an_answer_of_a_teacher(self) -> None:
        assert answered_by([1, 2], [3, 4]) == Example((1, 2, 3, 4), ((2, 4),))
        for prompt, answer, what in (([], [1], "prompt"), ([1], [], "answer")):
            with pytest.raises(Refused, match=f"the {what} has no tokens"):
                answered_by(prompt, answer)


class TestQuestions:
    def test_what_serving_asks(self, growing: Tokenizer, bare: Tokenizer) -> None:
        for record in (Record(ASKED, plain=True), Record((*ASKED, Turn("assistant", "x")), plain=True)):
            assert question_ids(record, growing, max_length=LONG) == growing.prompt_ids(messages(ASKED))
            assert question_ids(record, bare, max_length=LONG) == bare.plain_prompt_ids("hello")

    def test_too_long(self, growing: Tokenizer) -> None:
        with pytest.raises(TooLong, match="more than max_length 2"):
            question_ids(Record(ASKED), growing, max_length=2)

    def test_documents(self, bare: Tokenizer) -> None:
        assert document_ids(Record(text="hello"), bare) == [1, *bare.encode("hello"), END]
        with pytest.raises(Refused, match="no plain text"):
            document_ids(Record(TWO_TURNS), bare)


class TestReadExamples:
    def write(self, folder: Path, *items: Any) -> Path:
        path = folder / "data.jsonl"
        path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in items))
        return path

    def item(self, completion: str = "world") -> dict[str, str]:
        return {"prompt": "hello", "completion": completion}

    def test_all_faults_of_form_and_of_tokens_in_one_message(
        self, growing: Tokenizer, tmp_path: Path
    ) -> None:
        path = self.write(
            tmp_path, self.item(), "{", self.item("a<|end|>"), self.item("long " * 50), self.item("")
        )
        with pytest.raises(Refused) as refusal:
            read_examples(path, growing, max_length=40)
        told = str(refusal.value)
        assert "4 of 5 lines cannot be used" in told
        places = [told.index(f"{path}:{line}: ") for line in (2, 3, 4, 5)]
        assert places == sorted(places)
        assert "more than max_length 40" in told

    def test_skipping_is_counted(self, growing: Tokenizer, tmp_path: Path) -> None:
        path = self.write(tmp_path, self.item(), "{", self.item("long " * 50), self.item())
        found = read_examples(path, growing, max_length=40, skip_bad=True)
        assert ([b.line for b in found.bad], found.too_long, len(found.examples)) == ([2, 3], (), 2)
        found = read_examples(path, growing, max_length=40, skip_bad=True, too_long="skip")
        assert ([b.line for b in found.bad], [b.line for b in found.too_long]) == ([2], [3])
        assert found.format == "prompt/completion"
        assert found.answer_tokens == 2 * (len(growing.encode("world")) + 1)

    def test_too_long_alone_may_be_skipped(self, growing: Tokenizer, tmp_path: Path) -> None:
        path = self.write(tmp_path, self.item(), self.item("long " * 50))
        assert len(read_examples(path, growing, max_length=40, too_long="skip").examples) == 1
        with pytest.raises(Refused, match=r"1 of 2 lines .*\n.*:2: .* more than max_length 40"):
            read_examples(path, growing, max_length=40)

    def test_nothing_left_is_refused(self, growing: Tokenizer, tmp_path: Path) -> None:
        path = self.write(tmp_path, self.item("long " * 50))
        with pytest.raises(Refused, match="every record is too long, the first: .* tokens"):
            read_examples(path, growing, max_length=10, too_long="skip")


def examples_of(lengths: list[int]) -> list[Example]:
    """Examples that can be told apart, of these lengths."""
    return [Example((number, *[0] * (n - 1)), ((1, n),)) for number, n in enumerate(lengths)]


class TestBatches:
    @given(
        lengths=st.lists(st.integers(2, 50), min_size=1, max_size=40),
        size=st.integers(1, 9),
        seed=st.integers(0, 2**32 - 1),
        epoch=st.integers(0, 3),
    )
    def test_every_example_once_an_epoch(self, lengths: list[int], size: int, seed: int, epoch: int) -> None:
        batches = Batches(examples_of(lengths), batch_size=size, seed=seed)
        steps = batches.steps_per_epoch
        epoch_batches = [batches.at(epoch * steps + step) for step in range(steps)]
        assert Counter(e.ids[0] for batch in epoch_batches for e in batch) == Counter(range(len(lengths)))
        assert sorted(map(len, epoch_batches), reverse=True)[:-1] == [size] * (steps - 1)

    def test_a_step_does_not_depend_on_the_way_to_it(self) -> None:
        data = examples_of([2 + n % 17 for n in range(100)])
        straight = Batches(data, batch_size=8, seed=3)
        seen = [straight.at(step) for step in range(40)]
        resumed = Batches(data, batch_size=8, seed=3)
        assert [resumed.at(step) for step in (39, 0, 20, 13)] == [seen[step] for step in (39, 0, 20, 13)]

    def test_epochs_and_seeds_differ(self) -> None:
        data = examples_of([5] * 64)
        batches = Batches(data, batch_size=8, seed=0)
        first, second = ([batches.at(step) for step in range(start, start + 8)] for start in (0, 8))
        assert first != second
        assert [Batches(data, batch_size=8, seed=1).at(step) for step in range(8)] != first

    def test_the_order_is_the_same_on_every_machine(self) -> None:
        batches = Batches(examples_of([3, 9, 4, 8, 5, 7, 6]), batch_size=3, seed=42)
        assert [[e.ids[0] for e in batches.at(step)] for step in range(3)] == [[6, 5, 3], [0, 2, 4], [1]]

    def test_lengths_are_grouped(self) -> None:
        lengths = [2 + (n * 7919) % 200 for n in range(800)]
        batches = Batches(examples_of(lengths), batch_size=8, seed=0)
        in_order = [lengths[i : i + 8] for i in range(0, 800, 8)]
        ungrouped = 1 - sum(lengths) / sum(max(batch) * 8 for batch in in_order)
        seen = [[len(e.ids) for e in batches.at(step)] for step in range(batches.steps_per_epoch)]
        grouped = 1 - sum(lengths) / sum(max(batch) * len(batch) for batch in seen)
        assert grouped < 0.05 < 0.3 < ungrouped

    def test_refusals(self) -> None:
        with pytest.raises(Refused, match="no examples"):
            Batches([], batch_size=1, seed=0)
        with pytest.raises(Refused, match="batch_size is 0"):
            Batches(examples_of([2]), batch_size=0, seed=0)
