"""A family on disk: what is copied into it, digests both ways, one object for one set of weights, two writers at once."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from heliostat.build import (
    Loaded,
    best_dtype,
    changing,
    config_of,
    describe_module,
    device_named,
    init_family,
    load_modules,
    load_tokenizer,
    module_digest,
    modules_of,
    new_module_folder,
    read_family,
    verify_member,
    verify_module,
    write_family,
)
from heliostat.errors import Refused
from heliostat.family import Family
from heliostat.linear.lora import adapter_of
from heliostat.llm import LLM


def flip(path: Path) -> None:
    """Another last byte, at the same time as before: only who reads the file sees it."""
    content, stamp = bytearray(path.read_bytes()), path.stat()
    content[-1] ^= 0xFF
    path.write_bytes(bytes(content))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


# A new family


def test_a_base_is_copied_without_what_is_not_its_own(tiny_base: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "hf"))
    for name in ("LICENSE", "README.md", "digest.json", "optimizer.bin", "training.py"):
        (base / name).write_text("{}")
    (base / "logs").mkdir()
    family = init_family(tmp_path / "fam", base)
    kept = {p.name for p in (tmp_path / "fam" / "base").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "LICENSE", "README.md"} <= kept
    assert not kept & {"optimizer.bin", "training.py", "logs"}
    note = json.loads((tmp_path / "fam" / "base" / "digest.json").read_text())
    assert note["digest"] == family.module("base").digest  # ours, not the one that came along
    assert family == read_family(tmp_path / "fam")
    sizes = sum(p.numel() for p in loaded(tmp_path / "fam", "base")["base"].model.parameters())
    assert family.module("base").parameters == sizes


def test_a_family_is_not_made_where_one_is_or_of_what_does_not_fit(
    bare_family: Path, tiny_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match="already a family"):
        init_family(bare_family, tiny_base)
    with pytest.raises(Refused, match=r"is no family .*heliostat init .*nowhere --base PATH"):
        read_family(tmp_path / "nowhere")
    small = Path(shutil.copytree(tiny_base, tmp_path / "hf"))
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 299}))
    with pytest.raises(Refused, match="the tokenizer has 300 tokens, the model only 299"):
        init_family(tmp_path / "new", small)
    (small / "config.json").write_text(json.dumps(config))
    template = (small / "chat_template.jinja").read_text()
    (small / "chat_template.jinja").write_text("{% for m in")
    with pytest.raises(
        Refused, match=r"the chat template cannot be read, line 1: .* mend chat_template.jinja"
    ):
        init_family(tmp_path / "new", small)
    (small / "chat_template.jinja").write_text(template)
    (small / "generation_config.json").write_text('{"eos_token_id": 99999}')
    with pytest.raises(Refused, match=r"eos_token_id 99999 is no token of the model, whose ids are 0 to"):
        init_family(tmp_path / "new", small)
    (small / "generation_config.json").unlink()
    tensors = load_file(small / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.inf
    save_file(tensors, small / "model.safetensors")
    with pytest.raises(Refused, match=r"model.safetensors: model.norm.weight holds 1 numbers that are not"):
        init_family(tmp_path / "new", small)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("when", ["copying", "describing", "writing"])
def test_an_init_that_died_is_not_in_the_way_of_the_next(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    class Killed(BaseException):
        pass

    def die(*words: Any, **options: Any) -> None:
        raise Killed

    place = {"copying": "shutil.copy2", "describing": "heliostat.build.digest_folder"}
    with monkeypatch.context() as broken:
        broken.setattr(place.get(when, "heliostat.build.write_family"), die)
        broken.setattr("heliostat.files.shutil.rmtree", lambda *words, **options: None)  # nobody tidies up
        with pytest.raises(Killed):
            init_family(tmp_path / "fam", tiny_base)
    (left,) = tmp_path.iterdir()
    # As it would lie there after a kill -9: of a process that is no more.
    left.rename(tmp_path / f"fam.partial-{2**22 + 1}-1")
    assert not (tmp_path / "fam").exists()
    family = init_family(tmp_path / "fam", tiny_base)
    assert read_family(tmp_path / "fam") == family and [p.name for p in tmp_path.iterdir()] == ["fam"]


def test_init_takes_an_empty_folder_and_leaves_a_full_one_alone(tmp_path: Path, tiny_base: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert init_family(tmp_path / "empty", tiny_base).modules.keys() == {"base"}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(Refused, match=r"full exists already; choose another name"):
        init_family(tmp_path / "full", tiny_base)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_devices_are_named_as_torch_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, auto in ((0, "cpu"), (2, "cuda")):
        monkeypatch.setattr("torch.cuda.device_count", lambda count=count: count)
        assert device_named("auto") == auto and device_named("cpu") == "cpu"
    assert device_named("cuda") == "cuda" and device_named("cuda:1") == "cuda:1"
    with pytest.raises(Refused, match="device is 'cuda:2'; torch sees here: cpu, cuda:0, cuda:1"):
        device_named("cuda:2")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for name in ("cuda", "cuda:0", "gpu", ""):
        with pytest.raises(Refused, match=rf"device is '{name}'; torch sees here: cpu \(or say auto\)"):
            device_named(name)


# Digests


def loaded(folder: Path, *names: str, verify: bool = True) -> dict[str, Loaded]:
    return load_modules(folder, read_family(folder), names, dtype=torch.float32, verify=verify)


def test_a_changed_file_is_seen_at_once_or_when_every_byte_is_read(tiny_family: Path) -> None:
    family = read_family(tiny_family)
    path = tiny_family / family.module("math.own").path / "model.safetensors"
    flip(path)
    verify_module(tiny_family, family, "math.own")  # size and time are as they were: the note is believed
    with pytest.raises(Refused, match=r"module 'math\.own' changed: .*\(math\) would answer wrongly"):
        verify_module(tiny_family, family, "math.own", fresh=True)
    with pytest.raises(Refused, match="changed"):  # and from now on by everybody
        loaded(tiny_family, "math.own")
    flip(path)
    verify_module(tiny_family, family, "math.own", fresh=True)
    loaded(tiny_family, "math.own")


def test_a_changed_table_is_refused_with_both_digests(tiny_family: Path) -> None:
    family = read_family(tiny_family)
    data = family.to_json()
    data["modules"]["math.own"]["digest"] = "0123456789abcdef"
    write_family(tiny_family, Family.from_json(data))
    now = family.module("math.own").digest[:12]
    with pytest.raises(Refused, match=f"has digest 0123456789ab, its files have {now}"):
        loaded(tiny_family, "math.own")
    assert loaded(tiny_family, "math.own", verify=False)["math.own"].digest == "0123456789abcdef"


def test_an_adapter_changes_with_the_weights_under_it(tiny_family: Path) -> None:
    family = read_family(tiny_family)
    before = module_digest(tiny_family, family, "plan.own", fresh=True)
    assert before == family.module("plan.own").digest
    flip(tiny_family / "base" / "model.safetensors")
    assert module_digest(tiny_family, family, "plan.own", fresh=True) != before
    assert module_digest(tiny_family, family, "math.own", fresh=True) == family.module("math.own").digest
    with pytest.raises(Refused, match=r"module 'base' changed.*\(code, math, plan\).*heliostat init"):
        verify_module(tiny_family, family, "plan.own", fresh=True)


def test_what_changes_the_function_is_part_of_the_digest(tiny_family: Path) -> None:
    family = read_family(tiny_family)
    folder = tiny_family / family.module("math.own").path
    for key, value, changes in (("rms_norm_eps", 1e-5, True), ("transformers_version", "9.9", False)):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        same = module_digest(tiny_family, family, "math.own") == family.module("math.own").digest
        assert same is not changes, key
        (folder / "config.json").write_text(json.dumps(config))
    folder = tiny_family / family.module("plan.own").path
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1}))
    with pytest.raises(Refused, match=r"module 'plan\.own' changed.*\(plan\).*or train again"):
        verify_module(tiny_family, family, "plan.own")


def test_a_member_remembers_the_weights_it_was_tuned_with(tiny_family: Path) -> None:
    family = read_family(tiny_family)
    for name, member in family.members.items():
        verify_member(family, name)
        assert member.digests == {n: family.module(n).digest for n in member.row.modules}
    data = family.to_json()
    data["modules"]["base"]["digest"] = "f" * 64
    with pytest.raises(Refused, match=r"'math' was tuned with 'base' of digest .*now has ffffffffffff: tune"):
        verify_member(Family.from_json(data), "math")
    verify_member(Family.from_json(data), "solo")  # its row does not name the base


def test_a_changed_tokenizer_is_refused(tiny_family: Path) -> None:
    family = read_family(tiny_family)
    assert load_tokenizer(tiny_family, family).digest == family.tokenizer
    path = tiny_family / "base" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"][0]["lstrip"] = not content["added_tokens"][0]["lstrip"]
    path.write_text(json.dumps(content))
    with pytest.raises(
        Refused, match=rf"digest {family.tokenizer[:12]}, its files have (?!{family.tokenizer[:12]})"
    ):
        load_tokenizer(tiny_family, family)


def test_a_module_is_described_as_tuning_described_it(tiny_family: Path) -> None:
    family = read_family(tiny_family)
    for name in ("math.own", "plan.own"):
        module = family.module(name)
        assert describe_module(tiny_family, name, module.path, base=module.base, family=family) == module
    assert config_of(tiny_family, family, "plan.own") == config_of(tiny_family, family)


# Memory


def test_one_set_of_weights_is_one_object(tiny_family: Path, tiny_data: Path) -> None:
    family = read_family(tiny_family)
    names = modules_of(family, ["plan", "math", "plan", "base"])
    assert names == ["base", "plan.own", "math.own"]
    found = loaded(tiny_family, "plan.own", "math.own", "base", "plan.own")
    assert found["plan.own"].model is found["base"].model
    assert found["math.own"].model is not found["base"].model
    assert adapter_of(found["base"].model, "plan.own")
    assert (found["plan.own"].adapter, found["base"].adapter) == ("plan.own", None)
    assert (found["plan.own"].weights, found["math.own"].weights) == ("base", "math.own")
    assert found["plan.own"].route == (("plan.own", 0, None),) and found["base"].route == ((None, 0, None),)
    assert not any(p.requires_grad for p in found["base"].model.parameters())


def test_a_read_only_family_loads_and_answers(tiny_family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for note in tiny_family.rglob("digest.json"):
        note.unlink()

    def forbidden(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", forbidden)  # whatever is written begins with a folder of its own
    assert len(LLM(tiny_family, dtype="float32").generate("add 1 and 2", member="plan", max_tokens=2)) == 1
    with pytest.raises(Refused, match="Read-only file system; change its rights"):
        write_family(tiny_family, read_family(tiny_family))
    assert not list(tiny_family.rglob("digest.json"))


def test_best_dtype_is_one_that_multiplies() -> None:
    assert best_dtype("cuda") is torch.bfloat16
    assert best_dtype() in (torch.bfloat16, torch.float32)


# Two commands at once


def test_a_dead_processs_leavings_go_when_their_name_is_needed(tiny_family: Path) -> None:
    family = read_family(tiny_family)
    (tiny_family / "modules" / "new.own").mkdir()
    (tiny_family / "modules" / "new.own" / "half").write_text("x")
    assert new_module_folder(tiny_family, family, "new.own") == "modules/new.own"
    assert not (tiny_family / "modules" / "new.own").exists()
    assert (tiny_family / "modules" / "math.own" / "config.json").exists()


ADDING = """
import sys
from pathlib import Path
from heliostat.build import changing, read_family, write_family
from heliostat.family import Member, Row

folder, who = Path(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
for number in range(20):
    with changing(folder):
        family = read_family(folder)
        name = f"{who}{number}"
        write_family(folder, family.with_member(Member(name, Row(*["base"] * 4), "independent")))
"""


def test_two_processes_adding_members_lose_none(bare_family: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ADDING, str(bare_family), who],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for who in "ab"
    ]
    for process in processes:  # both are there before either begins
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    expected = {f"{who}{number}" for who in "ab" for number in range(20)}
    assert set(read_family(bare_family).members) == expected
    with changing(bare_family):  # and the lock is free again
        pass
