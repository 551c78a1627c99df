"""The comparison of engines: what is run and kept, what is left out, and what the page says."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from heliostat.bench import decode, engine, peer

TINY = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 32}
SPEED = {"what": "7", "decode": {"1": 0.5, "8": 1.0}, "prefill": {"128": 2.0}}
PART = {
    "step": {"1": 0.3, "8": 0.6},
    "bare": {"1": 0.2, "8": 0.5},
    "memory": 0.1,
    "planning": 0.01,
    "busy": 1.0,
}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in engine.PYTHONS.values():
        monkeypatch.delenv(name, raising=False)


def test_each_round_begins_with_another_and_has_each_engine_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIOSTAT_VLLM", sys.executable)
    todo = engine.pieces(["a"], 4)
    rounds = [[e for _, e, number in todo if number == n] for n in range(4)]
    assert {frozenset(r) for r in rounds} == {frozenset({"parts", "heliostat", "transformers", "vllm"})}
    assert len({r[0] for r in rounds}) == 4


def test_what_is_kept_is_not_run_again_and_time_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "SHAPES", {"tiny": TINY})
    ran: list[tuple[str, int]] = []

    def run(name: str, which: str, folder: Path, number: int) -> dict[str, Any]:
        ran.append((which, number))
        return PART if which == "parts" else SPEED

    monkeypatch.setattr(engine, "run", run)
    todo, work = engine.pieces(["tiny"], 2), tmp_path / "kept"
    work.mkdir()
    assert not engine.measure(todo, work, minutes=-1) and not ran
    assert engine.measure(todo, work, minutes=9) and len(ran) == 6
    assert engine.measure(todo, work, minutes=9) and len(ran) == 6
    assert engine.gathered(todo, work)["tiny"]["parts"] == PART


def test_the_page_says_who_was_left_out_and_how_many_times_as_fast_we_are() -> None:
    birth = {"threads": 2, "repeats": 5, "command": "c", "hardware": "h", "commit": "0", "date": "d"}
    slower = {"what": "8", "decode": {"1": 1.0, "8": 1.5}, "prefill": {"128": 3.0}}
    text = engine.page({"tiny": {"parts": PART, "heliostat": SPEED, "transformers": slower}}, birth)
    assert "| transformers (8) | 1 (2.00x) | 5 (1.50x) | 43 (1.50x) |" in text
    assert "vllm (HELIOSTAT_VLLM names no Python)" in text
    assert "| 8 | 600.00 | 1.20x | 6.00x |" in text and "1.0% of a step" in text


@pytest.mark.parametrize("which", ["heliostat", "transformers"])
def test_a_peer_answers_and_says_its_times(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "SHAPES", {"tiny": TINY})
    engine.write_model(tmp_path / "tiny", "tiny")
    more = {"threads": 1, "seed": 1, "batches": [1, 2], "prompt": 8, "steps": 2, "lengths": [9], "most": 64}
    spec = {"engine": which, "folder": str(tmp_path / "tiny"), **more}
    command = [sys.executable, "-P", peer.__file__, json.dumps(spec)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["decode"].keys() == {"1", "2"} and found["prefill"]["9"] > 0


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from safetensors.torch import load_file

    monkeypatch.setattr(decode, "SHAPES", {"tiny": TINY})
    engine.write_model(tmp_path, "tiny")
    path = tmp_path / "model.safetensors"
    want = load_file(path)
    found = dict(peer._tensors(str(path)))
    assert found.keys() == want.keys()
    assert all(torch.equal(torch.from_numpy(found[name]), want[name].float()) for name in want)
    names = [peer._gguf_name(name) for name in found]
    assert len(set(names)) == len(names) and "blk.0.attn_q.weight" in names


def test_a_failure_is_told_with_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(engine.Refused, match="parts on tiny failed"):
        engine.run("tiny", "parts", tmp_path / "nothing", 0)
