"""The pretraining corpus of the embedded base: a seeded stream of short documents that teach skills, no task.

The base learns the languages that specialists will need - JSON, worked sums, edited text - and above all to
take its conventions from the context: key names, layouts and wordings are drawn afresh for each document, and
are told or shown in it. The tasks' own wordings, tool names and answer formats are left out.
"""

import random
from collections.abc import Callable, Iterator

from heliostat.tasks import corpus_numbers as numbers
from heliostat.tasks import corpus_records as records
from heliostat.tasks import corpus_words as words
from heliostat.tasks.lessons import Document

MIXTURE: dict[Callable[[random.Random], Document], float] = {
    numbers.words_and_digits: 3,
    numbers.equations: 9,
    numbers.equation_chains: 5,
    numbers.tables: 0.5,
    numbers.sums_asked: 2,
    numbers.chains: 8,
    numbers.running_totals: 4,
    numbers.stories_worked: 6,
    numbers.clock_times: 3,
    numbers.clock_sums: 3,
    numbers.amounts: 2,
    numbers.days_in_order: 1,
    numbers.timetable: 1,
    records.requests_shown: 7,
    records.requests_told: 8,
    records.records_listed: 5,
    records.record_asked: 2,
    records.record_changed: 2,
    records.record_told: 1,
    records.records_alone: 0.5,
    records.echoes: 3,
    words.rewritings_told: 16,
    words.rewritings_shown: 3,
    words.steps_shown: 4,
    words.places_asked: 3,
    words.capitals: 2,
    words.copies: 3,
    words.recalled: 2,
    words.facts_asked: 2,
    words.prose: 0.5,
    words.small_talk: 0.3,
    words.choices: 1,
}
"""Lesson -> its share of the documents, in percent of the sum."""


def documents(seed: int, n: int) -> Iterator[Document]:
    """n documents, {"text"} or {"messages"}; the same for the same seed, and the first n of any more."""
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
