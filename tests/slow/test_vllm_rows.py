"""Every sharing on vLLM is token-exact beside the embedded engine; what cannot be so fails (``make test-vllm``)."""

import json
import socket
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen3Config

from heliostat.bench import gpu_vllm
from heliostat.bench.vllm_offline import Offline
from heliostat.build import read_family
from heliostat.engine.request import Sampling
from heliostat.errors import Refused
from heliostat.family import Family
from heliostat.llm import LLM
from heliostat.vllm import kept, layout, wire
from tests.slow.vllm_family import PAGE, SHAPE, family, inside, launch, offline, python

pytestmark = pytest.mark.slow

TOKENS = 12
LENGTHS = (1, 2, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE - 1, 2 * PAGE, 2 * PAGE + 1, 3 * PAGE)
CLOSE = 1e-4
"""Top two logits nearer than this are a tie: either token may win."""
Ids = list[int]


@dataclass
class Stand:
    """A family, what the embedded engine says, and the names that workers know modules by."""

    place: Path
    llm: LLM = field(init=False)
    ties: int = 0

    def __post_init__(self) -> None:
        self.llm = LLM(self.place, dtype="float32", cache_mib=64)

    @property
    def family(self) -> Family:
        return self.llm.family

    def digest(self, module: str) -> str:
        return self.family.module(module).digest

    def model(self, module: str) -> str:
        return f"{module}#{self.digest(module)[:12]}"

    def wanted(self, asked: Sequence[tuple[str, Ids]]) -> list[Ids]:
        """Of (member, prompt): what the embedded engine says, greedily."""
        prompts, members = [prompt for _, prompt in asked], [member for member, _ in asked]
        answers = self.llm.generate(prompts, member=members, max_tokens=TOKENS, ignore_eos=True)
        return [list(answer.ids) for answer in answers]

    def wrong(self, asked: Sequence[tuple[str, Ids]], found: Sequence[Ids]) -> list[Any]:
        """Those that are answered otherwise; a difference at a tie is counted and is none."""
        return [
            (member, len(prompt), want, got)
            for (member, prompt), want, got in zip(asked, self.wanted(asked), found, strict=True)
            if got != want and not self._tie(member, prompt, want, got)
        ]

    def _tie(self, member: str, prompt: Ids, want: Ids, got: Ids) -> bool:
        place = next((n for n, pair in enumerate(zip(want, got, strict=False)) if pair[0] != pair[1]), None)
        if place is None:
            return False
        wish = Sampling(max_tokens=TOKENS, ignore_eos=True, logprobs=2)
        pieces = self.llm._run([self.llm._request(prompt, member, wish, None, None)])
        sampled = [piece.sampled for piece in pieces if piece.sampled is not None]
        (_, first), (_, second) = sampled[place].top[:2]
        self.ties += first - second < CLOSE
        return first - second < CLOSE


def free_port() -> int:
    """One that nobody listens at, nor at what NIXL adds to it."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1]) % 20000 + 10000


def prompts(*lengths: int, seed: int = 7) -> list[Ids]:
    chance = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 1000, (n,), generator=chance).tolist() for n in lengths]


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Stand:
    python()
    return Stand(family(tmp_path_factory.mktemp("vllm")))


def read(stand: Stand, asked: Sequence[tuple[str, Ids]], reader: Offline) -> list[tuple[Ids, Any]]:
    """What is said first, and of keys and values, of each (member, prompt): the first half."""
    requests = []
    for member, prompt in asked:
        row = stand.family.row(member)
        boundary, writer = row.boundary(len(prompt)), row.prompt_writer
        if boundary:
            keep = wire.keep(stand.digest(writer), boundary)
            ids = prompt[:boundary]
            requests.append({"model": stand.model(writer), "prompt": ids, "max_tokens": 1, wire.PARAMS: keep})
    said = iter(reader.ask(requests))
    found: list[tuple[Ids, Any]] = []
    for member, prompt in asked:
        row = stand.family.row(member)
        if not (boundary := row.boundary(len(prompt))):
            found.append(([], wire.alone(stand.digest(row.answer_writer))))
            continue
        one = next(said)
        first = one["tokens"] if boundary == len(prompt) else []
        found.append((first, wire.load(one["params"], stand.digest(row.prompt_writer), boundary)))
    return found


def told(
    stand: Stand, asked: Sequence[tuple[str, Ids]], halves: Sequence[tuple[Ids, Any]], speaker: Offline
) -> list[Ids]:
    """The answers: the second half."""
    requests = [
        {
            "model": stand.model(stand.family.row(member).speaker),
            "prompt": prompt + first,
            "max_tokens": TOKENS - len(first),
            wire.PARAMS: params,
        }
        for (member, prompt), (first, params) in zip(asked, halves, strict=True)
    ]
    done = speaker.ask(requests)
    return [first + one["tokens"] for (first, _), one in zip(halves, done, strict=True)]


def apart(stand: Stand, asked: Sequence[tuple[str, Ids]], reader: Offline, speaker: Offline) -> list[Ids]:
    return told(stand, asked, read(stand, asked, reader), speaker)


def alone(stand: Stand, asked: Sequence[tuple[str, Ids]], worker: Offline) -> tuple[list[Ids], list[int]]:
    """Answers of one worker that does all, and how many tokens of each prompt it found again."""
    requests = []
    for member, prompt in asked:
        row = stand.family.row(member)
        params = wire.alone(stand.digest(row.answer_writer))
        model = stand.model(row.speaker)
        requests.append({"model": model, "prompt": prompt, "max_tokens": TOKENS, wire.PARAMS: params})
    done = worker.ask(requests)
    return [one["tokens"] for one in done], [one["cached"] for one in done]


def crowd(members: Sequence[str], found: Sequence[Ids]) -> list[tuple[str, Ids]]:
    """Everybody with every prompt, so that neighbours in the batch are of different members."""
    return [(member, prompt) for prompt in found for member in members]


def grown(asked: Sequence[tuple[str, Ids]], answers: Sequence[Ids]) -> list[tuple[str, Ids]]:
    """The next turn of each conversation."""
    return [
        (member, [*prompt, *said, 5, 6, 7]) for (member, prompt), said in zip(asked, answers, strict=True)
    ]


HANDED = ("sun-a", "sun-b", "pre-a", "pre-b")


@pytest.fixture(scope="module")
def halves(stand: Stand, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Offline, Offline]]:
    """Who reads and who speaks: the base and its adapters, in a process each."""
    reader = launch(stand.place, "reader", "base", ["sun-a.own", "sun-b.own"], role="prefill")
    speaker = launch(stand.place, "speaker", "base", ["pre-a.own", "pre-b.own"], role="decode")
    with offline(reader, speaker, log=tmp_path_factory.mktemp("halves")) as (one, other):
        yield one, other


def handed(stand: Stand) -> list[str]:
    """Files of what is still kept."""
    folder = kept.private_folder(str(stand.place.parent / "handed"))
    return sorted(file.name for file in folder.glob("*.pages"))


def test_prompts_are_handed_over_to_the_token(stand: Stand, halves: tuple[Offline, Offline]) -> None:
    asked = crowd(HANDED, prompts(*LENGTHS))
    answers = apart(stand, asked, *halves)
    assert stand.wrong(asked, answers) == []
    again = grown(asked, answers)
    assert stand.wrong(again, apart(stand, again, *halves)) == [], "the next turn of everybody"
    assert handed(stand) == [], "what was fetched is gone"


def test_one_prompt_of_four_members_is_never_one_s_for_another(
    stand: Stand, halves: tuple[Offline, Offline]
) -> None:
    (prompt,) = prompts(4 * PAGE, seed=8)
    asked = [(member, prompt) for member in HANDED] * 8
    assert stand.wrong(asked, apart(stand, asked, *halves)) == []  # 32 of 32


def test_what_is_not_what_it_should_be_fails_and_is_not_read_anew(
    stand: Stand, halves: tuple[Offline, Offline]
) -> None:
    reader, speaker = halves
    (prompt,) = prompts(2 * PAGE, seed=9)
    asked = [("sun-a", prompt)]
    ((first, params),) = read(stand, asked, reader)
    right = {"model": stand.model("base"), "prompt": prompt + first, "max_tokens": 4, wire.PARAMS: params}
    changed: dict[str, dict[str, Any]] = {
        "another writer": {wire.PARAMS: {**params, "writer": stand.digest("sun-b.own")}},
        "another count": {wire.PARAMS: {**params, "tokens": 5}},
        "other tokens": {"prompt": [4, *prompt[1:], *first]},
        "another make": {wire.PARAMS: {**params, "fit": "other"}},
        "nothing": {wire.PARAMS: None},
        "a module that only loads": {wire.PARAMS: wire.alone(stand.digest("sun-a.own"))},
        "nowhere": {wire.PARAMS: {**params, "handle": "gone-" + "0" * 32}},
        "a path": {wire.PARAMS: {**params, "handle": "../../secret"}},
    }
    for what, change in changed.items():
        (failed,) = speaker.ask([{**right, **change}])
        assert (failed["finish"], failed["tokens"]) == ("error", []), what
    assert len(handed(stand)) == 1, "nobody else's is taken away"
    assert told(stand, asked, [(first, params)], speaker) == stand.wanted(asked)
    (gone,) = speaker.ask([right])
    assert gone["finish"] == "error", "it was fetched already"
    (kept_nothing,) = reader.ask([{**right, wire.PARAMS: wire.keep(stand.digest("base"), 3)}])
    assert "tokens should be kept" in kept_nothing["params"]["failed"]
    assert apart(stand, asked, reader, speaker) == stand.wanted(asked), "and all goes on"


def test_who_must_give_way_loads_again(stand: Stand, tmp_path: Path, halves: tuple[Offline, Offline]) -> None:
    small = launch(stand.place, "small", "base", role="decode", cache_mib=1)  # ten pages
    asked = crowd(["sun-a", "sun-b"], prompts(*(PAGE * n - 3 for n in (1, 2, 3)), seed=10))
    with offline(small, log=tmp_path) as (speaker,):
        assert stand.wrong(asked, apart(stand, asked, halves[0], speaker)) == []
        text = speaker.log.read_text()
    assert "fails" not in text


def test_modules_of_their_own_weights_are_handed_over_too(
    stand: Stand, tmp_path: Path, halves: tuple[Offline, Offline]
) -> None:
    reader = launch(stand.place, "sun-f", "sun-f.own", role="prefill")
    speaker = launch(stand.place, "pre-f", "pre-f.own", role="decode")
    found = prompts(1, PAGE - 1, PAGE, 3 * PAGE + 1, seed=11)
    with offline(reader, speaker, log=tmp_path) as (sun, pre):
        for member, one, other in (("sun-f", sun, halves[1]), ("pre-f", halves[0], pre)):
            asked = crowd([member], found)
            answers = apart(stand, asked, one, other)
            assert stand.wrong(asked, answers) == []
            again = grown(asked, answers)
            assert stand.wrong(again, apart(stand, again, one, other)) == []


def test_who_shares_nothing_is_served_by_a_worker(stand: Stand, tmp_path: Path) -> None:
    full = launch(stand.place, "solo", "solo.own")
    adapted = launch(stand.place, "solo-a", "base", ["solo-a.own"])
    found = prompts(*LENGTHS, seed=12)
    with offline(full, adapted, log=tmp_path) as (one, other):
        for members, worker in ((["solo"], one), (["solo-a", "base"], other)):
            asked = crowd(members, found)
            answers, _ = alone(stand, asked, worker)
            assert stand.wrong(asked, answers) == [], "the base beside an adapter, too"


def two_streams(stand: Stand, log: Path, members: Sequence[str], found: Sequence[Ids], **more: Any) -> None:
    """Everybody speaks over what the base writes: exact, and each finds what was written for the others."""
    adapters = [f"{member}.own" for member in members if member != "base"]
    made = launch(stand.place, "streams", "base", adapters, two_streams=True, **more)
    with offline(made, log=log) as (worker,):
        asked = crowd(members, found)
        answers, _ = alone(stand, asked, worker)
        assert stand.wrong(asked, answers) == []
        again = grown(asked, answers)
        answers, cached = alone(stand, again, worker)
        assert stand.wrong(again, answers) == []
        for (_, prompt), count in zip(again, cached, strict=True):
            # All but what the answer's last token, not yet run, and the new words begin.
            assert count >= (len(prompt) - 4) // PAGE * PAGE
        first = next(member for member in members if member != "base")
        (text,) = prompts(3 * PAGE, seed=13)
        alone(stand, [(first, text)], worker)
        others = [(member, text) for member in members if member != first]
        answers, cached = alone(stand, others, worker)
        assert stand.wrong(others, answers) == [] and set(cached) == {2 * PAGE}


def test_two_streams_of_llama(stand: Stand, tmp_path: Path) -> None:
    # Prompts in several chunks, so that passes hold rows after which nobody speaks.
    chunks = ("--max-num-batched-tokens", "48", "--enable-chunked-prefill")
    two_streams(stand, tmp_path, ["base", "ica-a", "ica-b"], prompts(*LENGTHS), extra=chunks)


@pytest.mark.parametrize("kind", [Qwen2Config, Qwen3Config])
def test_two_streams_of_qwen(tmp_path: Path, kind: Any) -> None:
    python()
    config = kind(**SHAPE, **({"head_dim": 64} if kind is Qwen3Config else {}))
    members = {"ica-a": ("icarus", "adapter")}
    stand = Stand(family(tmp_path, config, members))
    two_streams(stand, tmp_path, ["base", "ica-a"], prompts(1, PAGE, 2 * PAGE + 1))


def test_two_streams_go_on_from_what_the_base_read(
    stand: Stand, tmp_path: Path, halves: tuple[Offline, Offline]
) -> None:
    made = launch(stand.place, "on", "base", ["ica-a.own", "ica-b.own"], two_streams=True, role="decode")
    with offline(made, log=tmp_path) as (speaker,):
        asked = crowd(["ica-a", "ica-b"], prompts(*LENGTHS, seed=16))
        answers = apart(stand, asked, halves[0], speaker)
        assert stand.wrong(asked, answers) == []
        again = grown(asked, answers)
        assert stand.wrong(again, apart(stand, again, halves[0], speaker)) == [], (
            "partly found, partly loaded"
        )
    assert handed(stand) == []


def test_heads_in_two_processes_are_handed_over_in_two_shares(stand: Stand, tmp_path: Path) -> None:
    found = read_family(stand.place)
    facts: dict[str, Any] = {
        "tensor_parallel": 2,
        "fit": layout.fit(stand.place, found, dtype="float32", page_size=PAGE, tensor_parallel=2),
    }
    reader = launch(stand.place, "reader", "base", ["sun-a.own"], role="prefill", **facts)
    speaker = launch(stand.place, "speaker", "base", ["pre-a.own"], role="decode", **facts)
    with offline(reader, speaker, log=tmp_path) as (one, other):
        asked = crowd(["sun-a", "pre-a"], prompts(2, PAGE, 2 * PAGE + 1, seed=17))
        assert stand.wrong(asked, apart(stand, asked, one, other)) == []
    assert handed(stand) == []


def has_nixl() -> bool:
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('nixl') is None)"
    return subprocess.run([python(), "-c", code], check=False).returncode == 0


def test_the_connector_between_machines_hands_over_to_the_token(stand: Stand, tmp_path: Path) -> None:
    if not has_nixl():
        pytest.skip("vLLM's environment has no nixl")
    facts = {"transfer": "nixl", "port": free_port()}
    reader = launch(stand.place, "reader", "base", ["sun-a.own"], role="prefill", **facts)
    facts["port"] = free_port()
    speaker = launch(stand.place, "speaker", "base", ["pre-a.own"], role="decode", **facts)
    with offline(reader, speaker, log=tmp_path) as (one, other):
        asked = crowd(["sun-a", "pre-a"], prompts(*LENGTHS, seed=14))
        halves = read(stand, asked, one)
        assert stand.wrong(asked, told(stand, asked, halves, other)) == []
        (prompt,) = prompts(2 * PAGE, seed=15)
        ((first, params),) = read(stand, [("sun-a", prompt)], one)
        right = {"model": stand.model("base"), "prompt": prompt + first, "max_tokens": 4, wire.PARAMS: params}
        for change in (
            {wire.PARAMS: None},
            {wire.PARAMS: {**params, "fit": "other"}},
            {wire.PARAMS: wire.alone(stand.digest("sun-a.own"))},
        ):
            (failed,) = other.ask([{**right, **change}])
            assert (failed["finish"], failed["tokens"]) == ("error", [])
        assert told(stand, [("sun-a", prompt)], [(first, params)], other) == stand.wanted([("sun-a", prompt)])


def test_the_script_for_a_gpu_runs_dry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_vllm.main(["--python", python(), "--dry-run"], {"PYTHONPATH": inside(tmp_path)})
    found = json.loads(Path(capsys.readouterr().out.split("written: ")[1].strip()).read_text())
    assert [(row["sharing"], row["same"]) for row in found["exact"]] == [
        ("sun", 8), ("prefillshare", 8), ("icarus", 8), ("independent", 8)
    ]  # fmt: skip
    assert {row["sharing"] for row in found["measured"]} == {row["sharing"] for row in found["exact"]}


def test_a_server_whose_pages_are_of_another_size_does_not_start(stand: Stand, tmp_path: Path) -> None:
    """Where vLLM makes pages otherwise than it was asked, the process ends with both numbers."""
    made = launch(stand.place, "other", "base", role="decode")
    broken = replace(made, page_size=2 * PAGE, extra=("--block-size", str(PAGE)))
    with pytest.raises(Refused, match="vLLM chose pages of 32 positions, asked for were 64"):
        with offline(broken, log=tmp_path):
            pass
