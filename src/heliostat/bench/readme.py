"""The README's table of what was measured: each number is taken from a results file, and a test holds the two equal.

``python -m heliostat.bench.readme`` writes it. A new result is a new ``Line`` in LINES; one whose file is not there yet is
left out. No torch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heliostat.errors import Refused
from heliostat.files import atomic_write_text

BEGIN, END = "<!-- measured -->", "<!-- /measured -->"
HEADS = ("what", "measured", "where")


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of a results file: keys and places that lead to it, joined by '/'."""

    path: str
    over: str = ""
    """Where it is divided by another."""
    show: str = "{:.1f}x"

    def text(self, results: Any) -> str:
        """As the README shows it. Raises Refused where the file has no such number."""
        value = number(results, self.path)
        return self.show.format(value / number(results, self.over) if self.over else value)


@dataclass(frozen=True, slots=True)
class Line:
    """A row: ``says`` has a name in braces for each of ``figures``."""

    what: str
    says: str
    file: str
    """Name of the results file and of its page, without ending."""
    figures: Mapping[str, Figure] = field(default_factory=dict)

    def cells(self, folder: Path) -> list[str]:
        """Of the table."""
        results = json.loads((folder / f"{self.file}.json").read_text(encoding="utf-8"))
        shown = {name: figure.text(results) for name, figure in self.figures.items()}
        return [self.what, self.says.format(**shown), f"[{self.file}](docs/results/{self.file}.md)"]


def number(results: Any, path: str) -> float:
    """What stands at the end of a path through lists and objects."""
    found = results
    for step in path.split("/"):
        try:
            found = _in_list(found, step) if isinstance(found, list) else found[step]
        except (KeyError, IndexError, TypeError, ValueError):
            raise Refused(
                f"the results have nothing at {step!r} of {path!r}: measure again, or mend LINES"
            ) from None
    if not isinstance(found, int | float) or isinstance(found, bool):
        raise Refused(f"the results have no number at {path!r}: {found!r}")
    return found


def _in_list(found: list[Any], step: str) -> Any:
    """By place, or the only one that is so: ``members=4&running=1`` of a list of cases."""
    if "=" not in step:
        return found[int(step)]
    wanted = dict(part.split("=") for part in step.split("&"))
    (one,) = [
        each for each in found if all(str(each.get("case", each)[n]) == value for n, value in wanted.items())
    ]
    return one


def beside(peer: str) -> dict[str, Figure]:
    """The engine at 100 million parameters beside another: decoding at three batch sizes, prompts at two lengths."""
    own, theirs = "found/100M/heliostat", f"found/100M/{peer}"
    return {
        **{f"b{b}": Figure(f"{theirs}/decode/{b}", f"{own}/decode/{b}") for b in (1, 8, 32)},
        **{f"p{n}": Figure(f"{theirs}/prefill/{n}", f"{own}/prefill/{n}") for n in (128, 2048)},
    }


SPEED = "decodes {b1}, {b8}, {b32} as fast at batch 1, 8, 32; reads prompts of 128 and 2048 tokens {p128}, {p2048}"
"""Of the engine beside another."""


def _two_rows() -> dict[str, Figure]:
    """Places of batches 1, 8, 32 among those of bench/profile."""
    places = {1: 0, 8: 2, 32: 4}
    rows = "shapes/100M/decode"
    return {
        **{f"two{b}": Figure(f"{rows}/{n}/icarus", f"{rows}/{n}/base", "{:.2f}x") for b, n in places.items()},
        **{
            f"own{b}": Figure(f"{rows}/{n}/multilora", f"{rows}/{n}/base", "{:.2f}x")
            for b, n in places.items()
        },
        "loop": Figure(f"{rows}/2/icarus_loop", f"{rows}/2/icarus"),
    }


def _members() -> dict[str, Figure]:
    """Tokens a second of one speaker for all, and of adapters, by members and requests running each, all alike."""
    cases = {"four1": (4, 1), "four4": (4, 4), "eight1": (8, 1), "eight4": (8, 4)}
    one = "cases/members={}&running={}&popularity=uniform&prompt=224"
    return {
        f"{name}_{system}": Figure(f"{one.format(*case)}/systems/{system}/ratio/value")
        for name, case in cases.items()
        for system in ("sun", "multilora")
    }


def _workflow(system: str, members: Sequence[int]) -> dict[str, Figure]:
    """Peaks, ceilings, and 95th percentiles of sessions at the baseline's peak load, by members."""
    found = {}
    for count in members:
        own = f"comparisons/members={count}"
        found[f"peak{count}"] = Figure(f"{own}/peaks/0/systems/{system}/ratio/value")
        found[f"ceiling{count}"] = Figure(f"{own}/peaks/0/systems/{system}/ceiling/throughput")
        found[f"tail{count}"] = Figure(f"{own}/loads/load=1.0/systems/{system}/p95_ratio/value")
    return found


def _saved() -> dict[str, Figure]:
    """Decode workers of separate models over those of one speaker, and of the whole service, by load; at equal limits."""
    found = {}
    for name, load in (("half", "0.5"), ("full", "1.0"), ("twice", "2.0")):
        ours, theirs = (f"rows/load={load}&sharing={sharing}" for sharing in ("sun", "independent"))
        found[name] = Figure(f"{theirs}/decode", f"{ours}/decode")
    return found


LINES: Sequence[Line] = (
    Line("the engine beside transformers' `generate`, 100M", SPEED, "engine", beside("transformers")),
    Line("the engine beside vLLM on CPU, 100M", SPEED, "engine", beside("vllm")),
    Line("the engine beside OpenVINO GenAI, 100M", SPEED, "engine", beside("openvino")),
    Line(
        "SUN beside N separate models on the same cores, decoding, 100M",
        "4 members with 1 or 4 requests each: {four1_sun}, {four4_sun} the tokens a second (multi-LoRA {four1_multilora}, "
        "{four4_multilora}); 8 members: {eight1_sun}, {eight4_sun} ({eight1_multilora}, {eight4_multilora})",
        "decode-members",
        _members(),
    ),
    Line(
        "SUN beside 4 separate models at equal limits, 24M, simulated",
        "{half}, {full}, {twice} fewer decode workers at 0.5, 1.0 and 2.0 times what one worker for each member and role "
        "carries",
        "workers",
        _saved(),
    ),
    Line(
        "PrefillShare beside 4 separate models, Reflexion, same cores and pages, 24M",
        "{peak4} the sessions a second (ceiling by tokens that need not run: {ceiling4}); at the others' peak load p95 of a "
        "session {tail4} shorter",
        "workflow-reflexion",
        _workflow("prefillshare", [4]),
    ),
    Line(
        "ICaRus beside multi-LoRA, ReAct, same cores and pages, 24M",
        "2, 4, 8 members: {peak2}, {peak4}, {peak8} the sessions a second (ceilings {ceiling2}, {ceiling4}, {ceiling8}); at "
        "the others' peak load p95 of a session {tail2}, {tail4}, {tail8} shorter",
        "workflow-react-members",
        _workflow("icarus", [2, 4, 8]),
    ),
    Line(
        "a step with a writer's and a speaker's row, beside one row, 100M",
        "takes {two1}, {two8}, {two32} as long at batch 1, 8, 32; an adapter for each of 8 members, one row: "
        "{own1}, {own8}, {own32}",
        "profile",
        _two_rows(),
    ),
    Line(
        "exact answers with a draft of a tenth, 13M, trained, beside none",
        "{b1}, {b2}, {b4}, {b8} the tokens a second at batch 1, 2, 4, 8; a rule that changes answers (`kl:0.1`) {kl1}, "
        "{kl2}, {kl4}, {kl8}",
        "selfjudge",
        {
            f"{name}{batch}": Figure(f"summary/{rule}/over_off/{batch}", show="{:.2f}x")
            for name, rule in (("b", "lossless"), ("kl", "kl:0.1"))
            for batch in (1, 2, 4, 8)
        },
    ),
)


def table(folder: Path, lines: Sequence[Line] = LINES) -> list[str]:
    """In Markdown, of those lines whose files are there."""
    rows = [line.cells(folder) for line in lines if (folder / f"{line.file}.json").is_file()]
    return [f"| {' | '.join(cells)} |" for cells in (HEADS, ["---"] * len(HEADS), *rows)]


def written(readme: str, folder: Path, lines: Sequence[Line] = LINES) -> str:
    """The README with its table as the files have it now. Raises Refused where it has no place for one."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise Refused(f"the README has no {BEGIN} ... {END}")
    return before + "\n".join([BEGIN, *table(folder, lines), END]) + after


def main(given: Sequence[str] | None = None) -> None:
    """Write the table into the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    asked = parser.parse_args(given)
    text = asked.readme.read_text(encoding="utf-8")
    atomic_write_text(asked.readme, written(text, asked.docs))


if __name__ == "__main__":
    main()
