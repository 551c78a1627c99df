"""The surface vocabulary that tasks and pretraining corpus share: names, things, numbers and clock times as people say them."""

import random
from collections.abc import Sequence


def listed(text: str, separator: str = " ") -> tuple[str, ...]:
    """The words of a text, or its pieces between separators."""
    return tuple(text.split(separator))


NAMES = listed(
    "anna ben carla david emma felix grace henry iris jack kim leo maria nina oscar paul rosa sam tom vera"
)
THINGS = listed(
    "apples books boxes cakes cards coins cups eggs flowers keys lemons letters maps nuts oranges pens "
    "plates shells stamps stones tickets toys"
)
ADJECTIVES = listed(
    "big blue bright brown clean cold dark fast fresh funny green happy heavy hot kind large little loud new "
    "old quick quiet red round sad short slow small soft strong sweet tall tiny warm white wild wise young"
)
NOUNS = listed(
    "bird boat book bread bridge cat chair child city clock cloud cow dog door farmer fish fox friend garden "
    "girl hill horse house king lamp man moon mountain river road sailor ship snow song star street teacher "
    "train tree village wall wind window wolf woman"
)
VERBS = listed(
    "brings builds carries closes cleans draws drops feels finds follows hears helps holds keeps leaves likes loves "
    "makes meets moves needs opens paints passes pulls pushes reaches sees sells shows takes touches wants watches"
)
ADVERBS = listed(
    "again alone early here late never now often outside quietly slowly soon there today together"
)
ROOMS = listed("kitchen bedroom bathroom office hall garage garden attic")
DAYS = listed("monday tuesday wednesday thursday friday saturday sunday")
CITIES = listed("oslo paris rome madrid berlin london vienna lisbon dublin prague athens tokyo")
GROCERIES = listed("milk bread eggs butter cheese rice apples onions coffee sugar flour lemons tea honey")
MUSIC = listed("jazz rock blues opera folk soul disco techno")
CHORES = listed(
    "water the plants|feed the cat|pay the rent|call the bank|buy a gift|clean the car|send the report|"
    "walk the dog|fix the door|book a table|take the pills|check the oven",
    "|",
)
NOTES = listed(
    "i am late|see you soon|dinner is ready|the train is full|call me back|i am at home|happy birthday|"
    "we need bread|good night|the door is open|thank you so much|come here now",
    "|",
)

_ONES = listed(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
_TENS = listed("_ _ twenty thirty forty fifty sixty seventy eighty ninety")


def number_words(number: int) -> str:
    """0..999 as spoken, without hyphens: 125 -> "one hundred twenty five"."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens] + (f" {_ONES[ones]}" if ones else "")
    hundreds, rest = divmod(number, 100)
    return f"{_ONES[hundreds]} hundred" + (f" {number_words(rest)}" if rest else "")


def part_of_day(hour: int) -> str:
    """The words that tell 6 from 18: "in the morning" (0-11), "in the afternoon" (12-17), "in the evening" (18-23)."""
    if hour < 12:
        return "in the morning"
    return "in the afternoon" if hour < 18 else "in the evening"


def _face(rng: random.Random, hour: int, minute: int) -> str:
    """The clock's face in words, on a dial of twelve hours: (18, 45) -> "quarter to seven" or "six forty five"."""
    this, following = number_words((hour - 1) % 12 + 1), number_words(hour % 12 + 1)
    if minute == 0:
        return rng.choice((this, f"{this} o'clock"))
    plain = f"{this} {'oh ' if minute < 10 else ''}{number_words(minute)}"
    named = {15: f"quarter past {this}", 30: f"half past {this}", 45: f"quarter to {following}"}.get(minute)
    if named is None and minute % 5 == 0:
        named = (
            f"{number_words(minute)} past {this}"
            if minute < 30
            else f"{number_words(60 - minute)} to {following}"
        )
    return plain if named is None else rng.choice((plain, named))


def spoken_time(rng: random.Random, hour: int, minute: int) -> str:
    """A time of day as people say it; always unambiguous: "quarter to seven in the evening", "six forty five pm"."""
    if minute == 0 and hour in (0, 12) and rng.random() < 0.5:
        return "midnight" if hour == 0 else "noon"
    suffix = part_of_day(hour) if rng.random() < 0.6 else ("am" if hour < 12 else "pm")
    return f"{_face(rng, hour, minute)} {suffix}"


def clock(hour: int, minute: int) -> str:
    """24 hours, two digits each: (6, 5) -> "06:05"."""
    return f"{hour:02d}:{minute:02d}"


def random_time(rng: random.Random) -> tuple[int, int]:
    """(hour, minute) between 05:00 and 23:55, minutes in steps of five."""
    return rng.randrange(5, 24), 5 * rng.randrange(12)


def pick_other(rng: random.Random, items: Sequence[str], but: str) -> str:
    """One of `items` that is not `but`."""
    while (item := rng.choice(items)) == but:
        pass
    return item


def sentence(rng: random.Random, words: int) -> list[str]:
    """A lower-case sentence of about that many words (3..9), as a list: "the old sailor sees a red boat now"."""
    subject = [rng.choice(("the", "a", "my", "our")), rng.choice(NOUNS)]
    target = [rng.choice(("the", "a", "his", "her", "your")), rng.choice(NOUNS)]
    text = subject if words == 3 else subject + [rng.choice(VERBS)] + (target if words > 4 else [])
    text = text + [rng.choice(VERBS)] if words == 3 else text
    if words > 5:
        text.insert(1, rng.choice(ADJECTIVES))
    if words > 6:
        text.insert(len(text) - 1, rng.choice(ADJECTIVES))
    return text + ([rng.choice(ADVERBS)] if words > 7 or words == 4 else [])
