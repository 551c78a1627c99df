"""The vocabulary that tasks and corpus share: names, things, numbers and clock times as people say them."""

import random
from collections.abc import Sequence


def listed(text: str, separator: str = " ") -> tuple[str, ...]:
    """The words of a text, or its pieces between separators."""
    return tuple(text.split(separator))


NAMES = listed("anna ben carla david emma felix grace henry iris leo maria tom")
THINGS = listed("apples books boxes cards coins cups eggs keys maps nuts pens plates shells stones")
ADJECTIVES = listed(
    "big blue bright cold dark fast green happy little loud new old quiet red small soft tall warm white "
    "young"
)
NOUNS = listed(
    "bird boat book cat child city cow dog farmer fish fox girl hill horse house king lamp man ship star "
    "teacher tree wolf"
)
VERBS = listed(
    "brings builds draws finds follows hears helps holds keeps likes meets needs opens sees takes wants"
)
ADVERBS = listed("again alone early here now often slowly today")
ROOMS = listed("kitchen bedroom bathroom office hall garage")
DAYS = listed("monday tuesday wednesday thursday friday saturday sunday")
CITIES = listed("oslo paris rome madrid berlin london vienna dublin")
GROCERIES = listed("milk bread eggs butter cheese rice apples coffee sugar tea")
MUSIC = listed("jazz rock blues opera folk disco")
CHORES = listed(
    "water the plants|feed the cat|pay the rent|call the bank|buy a gift|clean the car|walk the dog|"
    "check the oven",
    "|",
)
NOTES = listed(
    "i am late|see you soon|dinner is ready|the train is full|call me back|i am at home|good night|"
    "we need bread",
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
    """The words that tell 6 from 18: in the morning (0-11), the afternoon (12-17), the evening."""
    if hour < 12:
        return "in the morning"
    return "in the afternoon" if hour < 18 else "in the evening"


def _face(rng: random.Random, hour: int, minute: int) -> str:
    """The dial of twelve hours in words: (18, 45) -> "quarter to seven" or "six forty five"."""
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
    """A time as people say it, never ambiguous: "quarter to seven in the evening", "six forty five pm"."""
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
    """A lower-case sentence of 3..8 words, as a list: "the old farmer sees a red boat now"."""
    text = [rng.choice(("the", "a", "my", "our")), rng.choice(NOUNS), rng.choice(VERBS)]
    if words > 4:
        text += [rng.choice(("the", "a", "his", "her", "your")), rng.choice(NOUNS)]
    if words > 5:
        text.insert(1, rng.choice(ADJECTIVES))
    if words > 6:
        text.insert(-1, rng.choice(ADJECTIVES))
    return text + ([rng.choice(ADVERBS)] if words in (4, 8) else [])
