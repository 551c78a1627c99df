"""The ledger: exact where memory is exact, read from heads of files alone, and refused with its numbers."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import heliostat.llm
from heliostat.build import init_family, load_modules, load_tokenizer, modules_of, read_family
from heliostat.engine import ledger as made
from heliostat.engine.ledger import MIB, Ledger, available_memory, ledger_of, weights_of
from heliostat.engine.paged import PagePool
from heliostat.engine.plan import plan_around
from heliostat.errors import Refused
from heliostat.llm import LLM
from heliostat.model.weights import state_of

ALL = ["base", "solo", "math", "code", "plan"]


def ledger(folder: Path, names: list[str], dtype: torch.dtype = torch.float32, pages: int = 10) -> Ledger:
    family = read_family(folder)
    needed = modules_of(family, names)
    return ledger_of(
        folder, family, needed, dtype=dtype, pages=pages, page_size=16, max_running=8, max_tokens_per_step=64
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", [["base"], ["plan"], ["math", "plan"], ALL])
def test_weights_are_those_that_loading_takes(
    names: list[str], dtype: torch.dtype, tiny_family: Path
) -> None:
    family = read_family(tiny_family)
    loaded = load_modules(tiny_family, family, modules_of(family, names), dtype=dtype)
    models = {id(module.model): module.model for module in loaded.values()}
    real = sum(p.numel() * p.element_size() for model in models.values() for p in model.parameters())
    lines = ledger(tiny_family, names, dtype).lines
    assert sum(size for what, size in lines if what.startswith(("weights", "adapter"))) == real
    assert len(lines) == len(models) + sum(m.adapter is not None for m in loaded.values()) + 2


def test_pages_are_those_of_the_pool_and_the_sum_is_the_sum(tiny_family: Path) -> None:
    family = read_family(tiny_family)
    model = load_modules(tiny_family, family, ["base"], dtype=torch.float32)["base"].model
    pool = PagePool(model.config, pages=10, page_size=16, dtype=torch.float32)
    found = ledger(tiny_family, ["base"])
    assert dict(found.lines)["10 pages of keys and values"] == pool.keys.nbytes + pool.values.nbytes
    assert found.total == sum(size for _, size in found.lines)
    assert ledger(tiny_family, ["base"], pages=20).total > found.total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_and_averages_are_counted(
    dtype: torch.dtype, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    family = tmp_path / "fam"
    init_family(family, make_checkpoint(model_type="heliostat_llama", attention={"kind": "affine"}))
    model = load_modules(family, read_family(family), ["base"], dtype=dtype)["base"].model
    pool = PagePool(model.config, pages=10, page_size=16, dtype=dtype)
    lines = dict(ledger(family, ["base"], dtype).lines)
    assert pool.sums.nbytes == 10 * 2 * 2 * 8 * 4
    assert lines["10 pages of keys and values"] == pool.keys.nbytes + pool.values.nbytes + pool.sums.nbytes
    assert lines["weights of base"] == sum(t.nbytes for t in state_of(model).values())


def test_only_heads_are_read(tiny_family: Path) -> None:
    file = tiny_family / "base" / "model.safetensors"
    before = ledger(tiny_family, ["base"])
    raw = bytearray(file.read_bytes())
    head = 8 + int.from_bytes(raw[:8], "little")
    raw[head:] = bytes(len(raw) - head)
    file.write_bytes(raw)
    assert ledger(tiny_family, ["base"]) == before
    file.write_bytes(raw[: head - 1])
    with pytest.raises(Refused, match=r"model.safetensors is damaged"):
        ledger(tiny_family, ["base"])


def test_what_does_not_fit_is_refused_with_the_numbers_before_anything_is_loaded(
    tiny_family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **options: object) -> None:
        raise AssertionError("loaded all the same")

    monkeypatch.setattr(heliostat.llm, "load_modules", never)
    with pytest.raises(Refused, match="does not fit into memory") as found:
        LLM(tiny_family, dtype="float32", memory_mib=1)
    table = dict(re.findall(r"^  (.+?)  +([\d.]+) MiB$", str(found.value), re.M))
    assert {"weights of base", "adapter plan.own", "together", "there is"} <= table.keys()
    parts = [float(size) for what, size in table.items() if what not in ("together", "there is")]
    assert float(table["together"]) == pytest.approx(sum(parts), abs=0.3) and table["there is"] == "1.0"
    monkeypatch.setattr(heliostat.llm, "available_memory", lambda device: 5 * MIB)
    with pytest.raises(Refused, match=r"there is +5.0 MiB"):
        LLM(tiny_family, dtype="float32")


def test_what_just_fits_is_loaded(tiny_family: Path) -> None:
    ledger(tiny_family, ["base"]).refuse_over(ledger(tiny_family, ["base"]).total)
    with pytest.raises(Refused):
        ledger(tiny_family, ["base"]).refuse_over(ledger(tiny_family, ["base"]).total - 1)
    assert LLM(tiny_family, members=["base"], memory_mib=10**6).generate("x", max_tokens=1)


def test_a_container_has_what_its_limit_leaves(tmp_path: Path) -> None:
    assert 0 < available_memory() < 2**50
    assert made._of_group(tmp_path) == []
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 100\n")
    for most, left in (("max", []), ("1000", [500]), ("100", [0])):
        (tmp_path / "memory.max").write_text(f"{most}\n")
        assert made._of_group(tmp_path) == left


def test_a_head_that_is_tied_is_counted_once(tiny_family: Path) -> None:
    config = json.loads((tiny_family / "base" / "config.json").read_text())
    assert config["tie_word_embeddings"]
    size = dict(ledger(tiny_family, ["base"]).lines)["weights of base"]
    assert size == read_family(tiny_family).module("base").parameters * 4


def test_what_is_there_already_takes_nothing_more(tiny_family: Path) -> None:
    family = read_family(tiny_family)
    needed = modules_of(family, ["plan", "math"])
    both = weights_of(tiny_family, family, needed, dtype=torch.float32)
    assert len(both.lines) == 3
    rest = weights_of(tiny_family, family, needed, dtype=torch.float32, there={"base", "plan.own"})
    assert [what for what, _ in rest.lines] == ["weights of math.own"] and rest.total < both.total
    assert not weights_of(tiny_family, family, needed, dtype=torch.float32, there=set(needed)).lines


def test_around_weights_in_memory_pages_and_workspace_must_fit(
    tiny_family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = read_family(tiny_family)
    modules = load_modules(tiny_family, family, ["base"], dtype=torch.float32)
    tokenizer = load_tokenizer(tiny_family, family)
    rows = {"base": family.row("base")}

    def never(*args: object, **options: object) -> None:
        raise AssertionError("a pool was made all the same")

    with monkeypatch.context() as patched:
        patched.setattr(heliostat.llm, "Engine", never)
        with pytest.raises(Refused, match=r"pages of keys and values +[\d.]+ MiB\n.*workspace"):
            LLM.of(modules, rows, tokenizer, memory_mib=1)
        patched.setattr(heliostat.llm, "available_memory", lambda device: MIB)
        with pytest.raises(Refused, match=r"there is +1.0 MiB"):
            LLM.of(modules, rows, tokenizer)
    llm = LLM.of(modules, rows, tokenizer, cache_mib=2, max_running=8)
    pages = llm.engine.table.pages
    whole = ledger_of(
        tiny_family,
        family,
        ["base"],
        dtype=torch.float32,
        pages=pages,
        page_size=16,
        max_running=8,
        max_tokens_per_step=2048,
    )
    room = plan_around([modules["base"].model], max_length=None, cache_mib=2, max_running=8)
    assert room.pages == pages and room.ledger.lines == whole.lines[1:]
