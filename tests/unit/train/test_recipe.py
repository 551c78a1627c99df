"""Recipes: limits, what `auto` comes to, YAML there and back, other tools' spellings, helpful refusals."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.errors import Refused
from heliostat.family import SHARINGS
from heliostat.train.pretrain_recipe import PretrainRecipe
from heliostat.train.recipe import ALL_LINEARS, ANY, DEFAULTS, TARGETS, Pace, Recipe, Settled, widest_rank
from heliostat.train.spellings import SPELLINGS, make_recipe, read_recipe, to_yaml

LEAST = {"family": "fam", "member": "math", "sharing": "sun", "data": "math.jsonl"}


def recipe(**values: Any) -> Recipe:
    return make_recipe(Recipe, {**LEAST, **values})


class TestArguments:
    def test_every_argument_has_help(self) -> None:
        for kind in (Recipe, PretrainRecipe):
            for name, field in kind.model_fields.items():
                assert field.description and field.description.endswith("."), name

    def test_a_recipe_does_not_change(self) -> None:
        with pytest.raises(ValueError, match="frozen"):
            recipe().seed = 3

    def test_the_defaults_table_is_complete(self) -> None:
        assert set(DEFAULTS) == {
            (sharing, tuner) for sharing in (*SHARINGS, ANY) for tuner in ("full", "lora", "paca")
        }
        assert {facts.targets for facts in SHARINGS.values()} <= set(TARGETS)

    def test_batch_size_and_steps(self) -> None:
        asked = recipe(per_device_train_batch_size=4, gradient_accumulation_steps=3, num_train_epochs=1.5)
        assert asked.batch_size == 12
        assert asked.total_steps(5) == 8
        assert recipe(max_steps=7).total_steps(5) == 7
        assert recipe(num_train_epochs=0.01).total_steps(5) == 1

    @pytest.mark.parametrize(
        ("values", "told"),
        [
            ({"learning_rate": -1}, "learning_rate is -1; it must be greater than 0, or 'auto'"),
            ({"learning_rate": "fast"}, "learning_rate is 'fast'; it must be a number, or 'auto'"),
            ({"learning_rate": float("nan")}, "learning_rate is nan; it must be .*number"),
            ({"seed": -1}, "seed is -1; it must be greater than or equal to 0"),
            ({"max_length": 1.5}, "max_length is 1.5; it must be a whole number"),
            ({"max_steps": 0}, "max_steps is 0; it must be at least 1, or -1"),
            ({"warmup_ratio": 1}, "warmup_ratio is 1; it must be less than 1"),
            ({"data": []}, r"data is \[\]; it must be not empty"),
            ({"member": 7}, "member is 7; it must be a text"),
            ({"bf16": "perhaps"}, "bf16 is 'perhaps'; it must be true or false, or 'auto'"),
            (
                {"report_to": "mlflow"},
                "report_to is 'mlflow'; it must be 'none', 'tensorboard', 'wandb' or 'trackio'",
            ),
            (
                {"sharing": "prefilshare"},
                r"no sharing 'prefilshare' \(did you mean 'prefillshare'\?\); there is: ",
            ),
            (
                {"tuner": "lorra"},
                r"tuner is 'lorra'; it must be 'full', 'lora' or 'paca', or 'auto' \(did you mean 'lora'\?\)",
            ),
            ({"lr_scheduler_type": "cosin"}, r"'warmup_stable_decay', or 'auto' \(did you mean 'cosine'\?\)"),
            ({"metric": "exakt"}, r"no metric 'exakt' \(did you mean 'exact'\?\)"),
            ({"learning_rte": 1}, r"no argument 'learning_rte' \(did you mean 'learning_rate'\?\)"),
            ({"zzz": 1}, "no argument 'zzz'$"),
            ({"r": 8}, "r: for tuner lora and paca only, and tuner is full"),
            ({"r": 8, "target_modules": "q_proj"}, "r, target_modules: for tuner lora and paca only"),
            ({"tuner": "lora", "columns": "norm"}, "columns: for tuner paca only, and tuner is lora"),
            ({"tuner": "paca", "lora_alpha": 8}, "lora_alpha: for tuner lora only.* factor of learning_rate"),
            (
                {"tuner": "paca", "columns": "best"},
                "columns is 'best'; it must be 'random', 'norm' or 'gradient'",
            ),
            ({"tuner": "paca", "r": 0}, "r is 0; it must be greater than or equal to 1"),
            ({"tuner": "lora", "r": 0}, "r is 0; it must be greater than or equal to 1"),
            ({"tuner": "lora", "target_modules": []}, r"target_modules is \[\]; it must be not empty"),
        ],
    )
    def test_refusals(self, values: dict[str, Any], told: str) -> None:
        with pytest.raises(Refused, match=told):
            recipe(**values)

    def test_all_faults_at_once(self) -> None:
        with pytest.raises(Refused) as refusal:
            make_recipe(
                Recipe,
                {"family": "f", "sharing": "sun", "data": "d", "seed": "x", "foo": 1},
                where="run.yaml",
            )
        lines = str(refusal.value).splitlines()
        assert lines[0].startswith("run.yaml:")
        assert [line.split()[0] for line in lines[1:]] == ["seed", "member", "no"]

    def test_missing_sharing_helps_to_choose(self) -> None:
        with pytest.raises(Refused) as refusal:
            make_recipe(Recipe, {name: value for name, value in LEAST.items() if name != "sharing"})
        for name, facts in SHARINGS.items():
            assert f"{name}: {facts.choose_when}" in str(refusal.value)


class TestResolve:
    @pytest.mark.parametrize("tuner", ["full", "lora", "paca"])
    @pytest.mark.parametrize("sharing", SHARINGS)
    def test_no_auto_is_left(self, sharing: str, tuner: str) -> None:
        settled = recipe(sharing=sharing, tuner=tuner).resolve(bf16=True, hidden_size=4096)
        defaults = DEFAULTS[sharing, tuner]
        left = {name for name in Settled.model_fields if getattr(settled, name) == "auto"}
        assert left == {"resume_from_checkpoint"}  # a wish about this run, not a value of the recipe
        assert (settled.learning_rate, settled.weight_decay) == (
            defaults.learning_rate,
            defaults.weight_decay,
        )
        assert settled.bf16 is True
        assert settled.warmup_steps(200) == round(200 * defaults.warmup_ratio)
        if tuner == "lora":
            assert (settled.r, settled.lora_alpha) == (defaults.r, 2 * defaults.r)
            assert settled.target_modules == TARGETS[SHARINGS[sharing].targets]
        elif tuner == "paca":
            assert (settled.r, settled.lora_alpha, settled.columns) == (defaults.r, None, "random")
            assert settled.target_modules == TARGETS[SHARINGS[sharing].targets]
        else:
            assert (settled.r, settled.lora_alpha, settled.target_modules) == (None, None, None)

    def test_what_was_asked_for_stays(self) -> None:
        values = {
            "tuner": "lora",
            "r": 5,
            "lora_alpha": 7,
            "target_modules": "q_proj, o_proj",
            "learning_rate": "1e-3",
        }
        settled = recipe(**values, bf16=False, lr_scheduler_type="constant").resolve(
            bf16=True, hidden_size=4096
        )
        assert (settled.r, settled.lora_alpha, settled.target_modules) == (5, 7.0, ("q_proj", "o_proj"))
        assert (settled.learning_rate, settled.lr_scheduler_type, settled.bf16) == (1e-3, "constant", False)
        assert settled.resolve(bf16=True, hidden_size=8) == settled

    def test_all_linears(self) -> None:
        assert recipe(tuner="lora", target_modules="all-linear").target_modules == ALL_LINEARS

    def test_rank_fits_a_small_model(self) -> None:
        assert [widest_rank(width) for width in (4, 8, 128, 192, 896, 4096)] == [1, 1, 16, 16, 64, 512]
        assert recipe(tuner="lora").resolve(bf16=False, hidden_size=128).r == 16

    def test_a_sharing_without_a_line_of_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(SHARINGS, "new", SHARINGS["icarus"])
        settled = recipe(sharing="new").resolve(bf16=False, hidden_size=64)
        assert settled.learning_rate == DEFAULTS[ANY, "lora"].learning_rate

    def test_the_tuner_is_the_sharing_s(self) -> None:
        assert [recipe(sharing=name).tuner for name in ("sun", "prefillshare", "icarus")] == [
            "full",
            "full",
            "lora",
        ]
        assert recipe(sharing="icarus", tuner="full").tuner == "full"
        assert recipe(sharing="icarus", r=8).resolve(bf16=False, hidden_size=64).r == 8


class TestYaml:
    @given(
        values=st.fixed_dictionaries(
            {"tuner": st.just("lora")},
            optional={
                "learning_rate": st.floats(1e-9, 1),
                "r": st.integers(1, 512) | st.just("auto"),
                "target_modules": st.lists(st.sampled_from(ALL_LINEARS), min_size=1),
                "data": st.lists(st.text("a:#'\"- é\\n0", min_size=1), min_size=1, max_size=3),
                "bf16": st.booleans() | st.just("auto"),
                "adam_epsilon": st.floats(1e-12, 1e-3),
                "teacher": st.none() | st.sampled_from(["old", "1e5", "no", "null", "~", "0x10"]),
            },
        ),
        settled=st.booleans(),
    )
    def test_there_and_back(
        self, tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any], settled: bool
    ) -> None:
        asked = recipe(**values)
        written = asked.resolve(bf16=True, hidden_size=64) if settled else asked
        path = tmp_path_factory.mktemp("yaml") / "recipe.yaml"
        path.write_text(to_yaml(written))
        read = read_recipe(Recipe, path)
        assert read.model_dump() == written.model_dump()
        if settled:
            assert read.resolve(bf16=False, hidden_size=8) == written

    def test_what_it_is_about_comes_first(self) -> None:
        assert to_yaml(recipe()).startswith("family: fam\nmember: math\nsharing: sun\ndata:\n- math.jsonl\n")

    @pytest.mark.parametrize(
        ("content", "told"),
        [
            (b"- a\n", "is no recipe"),
            (b"", "is no recipe"),
            (b"1: a\n", "is no recipe"),
            (b"a: [\n", r"is not YAML: .*line 2, column 1"),
            (b"a: !!python/object/apply:os.system [ls]\n", "is not YAML"),
            (b"a: \xff\n", "is not UTF-8"),
            (b"famly: x\n", "recipe.yaml: "),
        ],
    )
    def test_bad_files(self, tmp_path: Path, content: bytes, told: str) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(content)
        with pytest.raises(Refused, match=told):
            read_recipe(Recipe, path)

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(Refused, match=r"none.yaml cannot be read: No such file"):
            read_recipe(Recipe, tmp_path / "none.yaml")


class TestSpellings:
    def test_they_are_taken_with_a_hint(self) -> None:
        hints: list[str] = []
        values = {
            "micro_batch_size": 2,
            "cutoff_len": 64,
            "finetuning_type": "lora",
            "lora_rank": 4,
            "num_epochs": 3,
        }
        told = make_recipe(
            Recipe,
            {"base_model": "fam", **values, "member": "m", "sharing": "sun", "data": "d"},
            tell=hints.append,
        )
        assert (told.per_device_train_batch_size, told.max_length, told.tuner, told.r) == (2, 64, "lora", 4)
        assert (told.family, told.num_train_epochs) == ("fam", 3.0)
        assert hints[0].startswith("hint: base_model is read as family, a folder made by `heliostat init")
        assert hints[2] == "hint: cutoff_len is read as max_length"
        assert len(hints) == 6

    def test_hints_go_to_stderr(self, capsys: pytest.CaptureFixture[str]) -> None:
        recipe(lr=1e-3)
        assert capsys.readouterr() == ("", "hint: lr is read as learning_rate\n")

    def test_twice_is_refused(self) -> None:
        with pytest.raises(Refused, match="learning_rate and lr both say learning_rate: keep one"):
            recipe(learning_rate=1e-3, lr=1e-4)

    def test_none_hides_an_argument_of_ours(self) -> None:
        names = {*Recipe.model_fields, *PretrainRecipe.model_fields}
        assert not names & set(SPELLINGS)
        assert set(SPELLINGS.values()) <= names


class TestPretrain:
    def test_defaults_resolve(self) -> None:
        asked = make_recipe(PretrainRecipe, {"output_dir": "base"})
        settled = asked.resolve(bf16=False)
        assert asked.data == ("embedded",)
        assert settled.head_dim * settled.num_attention_heads == settled.hidden_size
        assert settled.tokens_per_batch == settled.batch_size * settled.max_length
        assert settled.warmup_steps() == 50
        assert "auto" not in {v for n, v in settled.model_dump().items() if n in ("bf16", "head_dim")}

    @pytest.mark.parametrize(
        ("values", "told"),
        [
            ({"num_key_value_heads": 4}, "num_attention_heads 6: no multiple of num_key_value_heads 4"),
            ({"hidden_size": 190}, "hidden_size 190 is no multiple of num_attention_heads 6: give head_dim"),
            ({"head_dim": 7}, "head_dim is 7; rotary positions need an even one"),
            ({"max_length": 4096}, "max_length 4096: above max_position_embeddings 1024"),
            ({"architecture": "lama"}, r"did you mean 'llama'\?"),
            ({"base_model": "x"}, "no argument 'base_model'"),
            ({"vocab_size": 10}, "vocab_size is 10; it must be greater than or equal to 260"),
        ],
    )
    def test_refusals(self, values: dict[str, Any], told: str) -> None:
        with pytest.raises(Refused, match=told):
            make_recipe(PretrainRecipe, {"output_dir": "base", **values})

    def test_a_head_of_its_own_width(self) -> None:
        assert (
            make_recipe(PretrainRecipe, {"output_dir": "b", "hidden_size": 190, "head_dim": 32}).head_dim
            == 32
        )

    def test_both_kinds_descend_alike(self) -> None:
        assert set(Pace.model_fields) <= set(Recipe.model_fields) & set(PretrainRecipe.model_fields)
