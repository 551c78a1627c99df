"""What vLLM calls in its processes: nothing where heliostat did not start them, and a clear end where parts are missing."""

from pathlib import Path

import pytest

from heliostat.errors import Refused
from heliostat.vllm import plugin
from heliostat.vllm.asked import INCARNATION, Settings
from heliostat.vllm.launch import KEY, Hosted, Launch, command, settings
from heliostat.vllm.sealed import seal


def test_a_process_of_somebody_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HELIOSTAT_WORKER", raising=False)
    plugin.register()


@pytest.mark.parametrize(
    ("keyed", "key", "match"),
    [
        (True, None, "VLLM_API_KEY is not set"),
        (True, "", "VLLM_API_KEY is not set"),
        (True, "secret", "0.26 to 0.32"),  # what is looked at next
        (False, None, "0.26 to 0.32"),
    ],
)
def test_a_server_that_should_have_a_key_ends_without_one(
    monkeypatch: pytest.MonkeyPatch, keyed: bool, key: str | None, match: str
) -> None:
    launch = Launch(name="w", weights=Hosted(name="base", digest="b" * 64, folder="/b"), keyed=keyed)
    for name, value in command(launch).environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(KEY, raising=False)
    if key is not None:
        monkeypatch.setenv(KEY, key)
    monkeypatch.setattr(plugin, "version", lambda package: "0.99.0")
    with pytest.raises(Refused, match=match):
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


def test_each_kind_of_process_asks_for_what_it_stands_on() -> None:
    hosted = Hosted(name="base", digest="b" * 64, folder="/b")
    plain, nixl, two = (
        plugin.stands_on(Settings(**settings(Launch(name="w", weights=hosted, **more))))
        for more in ({}, {"role": "decode", "transfer": "nixl"}, {"two_streams": True})
    )
    assert plain == plugin.STANDS_ON
    (package,) = (module for module in nixl if module.endswith(".nixl"))
    assert "NixlConnector.request_finished_all_groups" in nixl[package]
    assert {
        "PunicaWrapperBase.add_lora_linear",
        "generate_block_hash_extra_keys",
        "_gen_lora_extra_hash_keys",
    } <= {name for names in two.values() for name in names}, "what both ask of one module is added up"
