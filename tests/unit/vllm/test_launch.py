"""The command line of a vLLM worker: what every role and kind must and must not say."""

import dataclasses
import json
from typing import Any

import msgspec
import pytest

from heliostat.errors import Refused
from heliostat.vllm.asked import INCARNATION, Settings, settings_of
from heliostat.vllm.launch import SETTINGS, Hosted, Launch, command, transfer_config

BASE = Hosted(name="base", digest="b" * 64, folder="/fam/exports/vllm/b")
MATH = Hosted(name="math.own", digest="a" * 64, folder="/fam/exports/vllm/a", rank=12)


def launch(**more: Any) -> Launch:
    return Launch(**{"name": "w", "weights": BASE, **more})


def option(words: tuple[str, ...], name: str) -> str:
    assert words.count(name) == 1, (name, words)
    return words[words.index(name) + 1]


def test_a_worker_by_itself_keeps_its_pages_and_moves_none() -> None:
    made = command(launch(max_length=512, cache_mib=3, dtype="float32", port=8123), python="py")
    assert made.words[:5] == ("py", "-m", "vllm.entrypoints.cli.main", "serve", BASE.folder)
    assert "--enable-prefix-caching" in made.words and "--kv-transfer-config" not in made.words
    assert option(made.words, "--served-model-name") == "base#" + "b" * 12
    assert option(made.words, "--kv-cache-memory-bytes") == str(3 << 20)
    assert option(made.words, "--port") == "8123"
    assert "--enable-lora" not in made.words and "--hf-overrides" not in made.words


@pytest.mark.parametrize(("role", "kind"), [("prefill", "kv_producer"), ("decode", "kv_consumer")])
@pytest.mark.parametrize("transfer", ["files", "nixl", "MooncakeConnector"])
def test_one_half_fails_what_it_cannot_load(role: Any, kind: str, transfer: str) -> None:
    made = command(launch(role=role, transfer=transfer))
    config = json.loads(option(made.words, "--kv-transfer-config"))
    assert config["kv_role"] == kind and config["kv_load_failure_policy"] == "fail"
    assert ("--enable-prefix-caching" in made.words) == (role == "prefill")
    assert config["kv_connector"] == {"files": "FileConnector", "nixl": "CheckedNixl"}.get(transfer, transfer)


def test_options_of_a_connector_go_through() -> None:
    config = transfer_config(launch(role="decode", transfer="nixl", transfer_options={"backends": ["UCX"]}))
    assert config["kv_connector_extra_config"]["backends"] == ["UCX"]
    assert config["kv_connector_extra_config"]["enforce_handshake_compat"] is False
    environment = command(launch(role="decode", transfer="nixl", host="10.0.0.2", port=8005)).environment
    assert environment["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "10.0.0.2"
    assert environment["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "9005"
    assert "VLLM_NIXL_SIDE_CHANNEL_PORT" not in command(launch(transfer="nixl")).environment


def test_adapters_go_by_their_names_and_the_weights_by_one_that_changes_nothing() -> None:
    made = launch(adapters=(MATH,), zero="/zero")
    words = command(made).words
    modules = [json.loads(words[words.index("--lora-modules") + n]) for n in (1, 2)]
    assert {m["name"]: m["path"] for m in modules} == {"base#" + "b" * 12: "/zero", MATH.model: MATH.folder}
    assert option(words, "--max-lora-rank") == "16" and option(words, "--max-loras") == "2"
    assert option(words, "--served-model-name") not in {m["name"] for m in modules}
    assert made.writers == made.modules
    with pytest.raises(Refused, match="changes nothing"):
        launch(adapters=(MATH,))


def test_two_streams_write_with_the_weights_and_find_their_pages_again() -> None:
    made = launch(adapters=(MATH,), zero="/zero", two_streams=True, device="cuda", page_size=16)
    words = command(made).words
    assert set(made.writers.values()) == {BASE.digest} and made.modules[MATH.model] == MATH.digest
    assert json.loads(option(words, "--hf-overrides")) == {"architectures": ["HeliostatTwoStreamLlama"]}
    assert "--enforce-eager" in words
    assert dataclasses.replace(made, role="decode").caches
    with pytest.raises(Refused, match="embedded engine"):
        dataclasses.replace(made, architecture="PhiForCausalLM")


def test_what_vllm_cannot_lay_out_is_refused() -> None:
    with pytest.raises(Refused, match="multiples of 32"):
        launch(page_size=16)
    with pytest.raises(Refused, match="rank 600"):
        launch(adapters=(dataclasses.replace(MATH, rank=600),), zero="/zero")


def test_a_process_knows_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    made = launch(role="decode", adapters=(MATH,), zero="/zero", fit="f", incarnation="i")
    environment = command(made).environment
    monkeypatch.setenv(SETTINGS, environment[SETTINGS])
    found = settings_of()
    assert found is not None and found.writers == made.writers and found.fit == "f"
    options = transfer_config(made)["kv_connector_extra_config"]["heliostat"]
    assert settings_of(options) == found == msgspec.convert(options, Settings)
    assert "VLLM_API_KEY" not in environment


def test_who_is_given_no_incarnation_draws_one_that_children_inherit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETTINGS, command(launch()).environment[SETTINGS])
    monkeypatch.delenv(INCARNATION, raising=False)
    one, other = settings_of(), settings_of()
    assert one is not None and one == other and len(one.incarnation) == 16
    monkeypatch.delenv(INCARNATION)
    assert settings_of() != one
    with pytest.raises(Refused, match="letters and digits"):
        launch(incarnation="../x")


def test_a_process_of_somebody_else_knows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SETTINGS, raising=False)
    assert settings_of() is None
