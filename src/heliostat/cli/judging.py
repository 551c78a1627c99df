"""``heliostat judge``: labels from a speaker's own answers, a probe, its threshold, and a picture of what it does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from heliostat.cli.advance import Advance
from heliostat.cli.failing import stop
from heliostat.cli.printing import Family, Json, note, percent, print_json, print_next, print_table
from heliostat.tasks.grade import METRICS_SHOWN

if TYPE_CHECKING:
    from heliostat.judging.picture import Answered
    from heliostat.judging.run import Judged, Wish

Draft = Annotated[str, typer.Option(help="Module whose tokens are judged.", show_default=False)]
Data = Annotated[
    Path,
    typer.Option(
        help="Prompts, jsonl of any kind that train reads; answers may be there.", show_default=False
    ),
]
Speaker = Annotated[str, typer.Option(help="Module that speaks, and whose states are read.")]
Member = Annotated[
    str | None,
    typer.Option(
        help="Member whose row answers; it must have this speaker.", show_default="the speaker alone"
    ),
]
Name = Annotated[str | None, typer.Option(help="Of the judge.", show_default="SPEAKER-DRAFT")]
Metric = Annotated[str, typer.Option(help=f"How results are compared. {METRICS_SHOWN}.")]
Prompts = Annotated[int | None, typer.Option(min=1, help="At most so many.", show_default="all")]
Calibration = Annotated[
    int, typer.Option(min=0, help="Prompts whose substituted tokens are followed to a result.")
]
Labels = Annotated[
    str,
    typer.Option(
        help="What says whether a token is acceptable: suffix (how well the answer would have gone on), or result "
        "(whether it comes to the same; many times the work)."
    ),
]
Suffix = Annotated[int, typer.Option(min=1, help="Tokens behind a token that its score looks at.")]
Share = Annotated[
    float,
    typer.Option(min=0, max=1, help="Of the known unacceptable tokens, that may be called acceptable."),
]
Tau = Annotated[
    float | None,
    typer.Option(
        help="Threshold of scores, in nats, where results cannot be compared.", show_default="found"
    ),
]
Recall = Annotated[
    float, typer.Option(min=0, max=1, help="Of the unacceptable tokens, that theta `recall` rejects.")
]
Theta = Annotated[str, typer.Option(help="How theta is chosen: recall or f1 (best F1, takes more).")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Of an answer.")]
Picture = Annotated[bool, typer.Option(help="Answer held-out prompts at several thetas, and draw it.")]
Seed = Annotated[int, typer.Option(min=0, help="Which prompts are used, and which are held out.")]


def judge(
    family: Family,
    draft: Draft,
    data: Data,
    speaker: Speaker = "base",
    member: Member = None,
    name: Name = None,
    metric: Metric = "contains",
    prompts: Prompts = None,
    calibration: Calibration = 100,
    labels: Labels = "suffix",
    suffix: Suffix = 20,
    share: Share = 0.1,
    tau: Tau = None,
    recall: Recall = 0.9,
    theta: Theta = "recall",
    max_tokens: MaxTokens = 512,
    picture: Picture = True,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """The speaker answers, and is asked how well its answer would go on behind each other token that the draft would say.

    Interrupted or killed, the same command goes on; labels stay in FAM/judging, for another --share, --recall or --theta.
    """
    from heliostat.judging.run import Wish, make_judge

    wish = Wish(
        family=str(family),
        speaker=speaker,
        draft=draft,
        data=str(data),
        member=member,
        name=name,
        metric=metric,
        prompts=prompts,
        calibration=calibration,
        labels=labels,
        suffix=suffix,
        share=share,
        tau=tau,
        recall=recall,
        choice=theta,
        longest=max_tokens,
        seed=seed,
    )
    with Advance(f"judge {wish.judge}", as_json=as_json, every=10) as bar:
        try:
            made = make_judge(wish, tell=bar.tell, echo=note)
            points = _drawn(wish, made, bar) if picture else []
        except KeyboardInterrupt:
            stop(f"stopped behind {bar.done} of {bar.total} prompts; the same command goes on from there")
    if as_json:
        return print_json(made.to_json() | {"answers": [_plain(point) for point in points]})
    _show(wish, made, points)


def _drawn(wish: Wish, made: Judged, bar: Advance) -> list[Answered]:
    """Accuracy and accepted length over theta, drawn beside the judge."""
    from heliostat.judging.asked import load_pair, read_asked
    from heliostat.judging.picture import draw, sweep

    folder = Path(wish.family)
    pair = load_pair(folder, wish.speaker, wish.draft, member=wish.member)
    asked = read_asked(Path(wish.data), pair, most=wish.prompts, seed=wish.seed)
    who, judge = pair.member, made.judge
    del pair  # its weights: the answers load their own
    points = sweep(
        folder, who, judge, wish.judge, asked, metric=wish.metric, longest=wish.longest, tell=bar.tell
    )
    draw(points, _picture(made), title=f"{wish.judge}: {min(len(asked.held_out), 100)} held-out prompts")
    return points


def _picture(made: Judged) -> Path:
    return made.path.with_suffix(".svg")


def _plain(point: Answered) -> dict[str, float | str]:
    """In plain values; JSON knows no infinity."""
    from dataclasses import asdict

    facts = asdict(point)
    return facts | {"theta": facts["theta"] if facts["theta"] <= 1 else "inf"}


def _show(wish: Wish, made: Judged, points: list[Answered]) -> None:
    learned, held_out = made.tokens
    facts = [
        ("prompts", f"{made.prompts[0]:,} to learn from, {made.prompts[1]:,} held out"),
        *([("left out, too long", f"{made.too_long:,}")] if made.too_long else []),
        ("tokens judged", f"{learned:,} and {held_out:,}, {percent(made.acceptable)} of them acceptable"),
        ("tau", f"{made.tau:.3f} nats" + ("" if wish.tau is not None else _known(made))),
        ("held out: area under the curve", f"{made.auc:.3f}"),
        *((f"theta by {how}", _point(how, made)) for how in made.points),
        ("seconds", f"{made.seconds:,.1f}"),
    ]
    print_table(facts, title=f"{wish.judge} judges what {wish.draft} drafts for {wish.speaker}")
    if points:
        rows = [
            (
                "exact" if p.theta > 1 else f"{p.theta:.3f}",
                percent(p.accuracy),
                f"{p.accepted_length:.2f}",
                percent(p.judged),
            )
            for p in points
        ]
        columns = ("theta", "right answers", "tokens a pass", "taken by the judge")
        print_table(rows, title="Held-out prompts, greedy, drafts as long as allowed", columns=columns)
        print(f"picture: {_picture(made)}")
    print(f"judge:   {made.path}\nlabels:  {made.labels_folder} (may be removed)")
    print_next([["serve", wish.family, "--draft", wish.draft, "--verify", "judged", *_named(wish)]])


def _named(wish: Wish) -> list[str]:
    return [] if wish.name is None else ["--judge", wish.name]


def _known(made: Judged) -> str:
    return f", from {made.known:,} tokens that changed the result of {made.measured:,} answers"


def _point(how: str, made: Judged) -> str:
    point = made.points[how]
    chosen = "  <- used" if made.judge.theta == point.theta else ""
    return (
        f"{point.theta:.3f}: takes {percent(point.accepted)}, rejects {percent(point.recall)} of the unacceptable, "
        f"F1 {point.f1:.3f}{chosen}"
    )
