"""What vLLM calls in its processes: nothing where heliostat did not start them, and a clear end where parts are missing."""

from pathlib import Path

import pytest

from heliostat.errors import Refused
from heliostat.vllm import plugin
from heliostat.vllm.asked import INCARNATION
from heliostat.vllm.launch import Hosted, Launch, command
from heliostat.vllm.sealed import seal


def test_a_process_of_somebody_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HELIOSTAT_WORKER", raising=False)
    plugin.register()


def test_what_is_missing_is_found_by_its_name() -> None:
    asked = {
        "heliostat.vllm.launch": ("Launch.role", "Launch.hands", "Launch.nothing"),
        "heliostat.no_such": ("x",),
    }
    assert plugin.missing(asked) == ["heliostat.vllm.launch.Launch.nothing", "heliostat.no_such.x"]


@pytest.mark.parametrize(("version", "match"), [("0.99.0", "0.26 to 0.32"), ("0.32.0", "lacks what")])
def test_an_unknown_vllm_ends_the_process(monkeypatch: pytest.MonkeyPatch, version: str, match: str) -> None:
    launch = Launch(name="w", weights=Hosted(name="base", digest="b" * 64, folder="/b"))
    for key, value in command(launch).environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(plugin, "version", lambda package: version)
    with pytest.raises(Refused, match=match):
        plugin.register()


def test_files_that_are_not_what_was_exported_end_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Compared once for all processes of a server: an environment of another server proves nothing."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    seal(tmp_path, "b" * 64)
    launch = Launch(name="w", weights=Hosted(name="base", digest="b" * 64, folder=str(tmp_path)))
    for key, value in command(launch).environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv(plugin.VERIFIED, "another")
    monkeypatch.setenv(INCARNATION, "this")
    monkeypatch.setattr(plugin, "version", lambda package: "0.32.0")
    monkeypatch.setattr(plugin, "missing", lambda asked: [])
    (tmp_path / "model.safetensors").write_bytes(b"weighty")
    with pytest.raises(Refused, match="is not what was exported"):
        plugin.register()
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    plugin.register()
    (tmp_path / "model.safetensors").unlink()
    plugin.register()
