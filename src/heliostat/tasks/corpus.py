"""The pretraining corpus of the embedded base: a seeded stream of short documents that teach skills, not the tasks.

The base learns the languages that specialists will need - JSON, worked sums, edited text - and above all to take
its conventions from the context: key names, layouts and wordings are drawn afresh for each document, and are told
or shown in it. The tasks' own wordings, tool names and answer formats are left out.
"""

import random
from collections.abc import Callable, Iterator

from heliostat.tasks import corpus_numbers as numbers
from heliostat.tasks import corpus_records as records
from heliostat.tasks import corpus_words as words
from heliostat.tasks.lessons import Document

MIXTURE: dict[Callable[[random.Random], Document], float] = {
    numbers.words_and_digits: 3,
    numbers.equations: 8,
    numbers.tables: 1,
    numbers.sums_asked: 4,
    numbers.chains: 8,
    numbers.running_totals: 4,
    numbers.stories_worked: 6,
    numbers.clock_times: 4,
    numbers.durations: 1,
    numbers.timetable: 2,
    records.requests_shown: 8,
    records.requests_told: 7,
    records.records_listed: 6,
    records.record_asked: 3,
    records.record_changed: 3,
    records.record_told: 2,
    records.records_alone: 1,
    records.echoes: 3,
    words.rewritings_told: 9,
    words.rewritings_shown: 3,
    words.steps_shown: 3,
    words.places_asked: 2,
    words.capitals: 2,
    words.copies: 3,
    words.recalled: 2,
    words.facts_asked: 2,
    words.prose: 1,
    words.small_talk: 0.5,
    words.choices: 1,
}
"""Lesson -> its share of the documents, in percent of the sum."""


def documents(seed: int, n: int) -> Iterator[Document]:
    """n documents, {"text"} or {"messages"}; the same for the same seed everywhere, and the first n of any more."""
    lessons, weights = list(MIXTURE), list(MIXTURE.values())
    rng = random.Random(f"corpus/{seed}")
    for _ in range(n):
        yield rng.choices(lessons, weights)[0](rng)


def rendered(document: Document) -> str:
    """The document as the text that the base is trained on, special tokens written out; it ends in <|end|>.

    Conversations are laid out as the chat template of heliostat.tasks.tokenizer does.
    """
    if "messages" in document:
        return "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in document["messages"])
    return f"{document['text']}<|end|>"
