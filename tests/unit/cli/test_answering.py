"""`generate`: what streams is what the engine says; a file of prompts comes back as jsonl."""

import json
from pathlib import Path

import pytest

from heliostat.llm import LLM
from tests.unit.cli.conftest import Heliostat


@pytest.mark.parametrize("member", ["base", "math", "plan"])
def test_a_prompt_streams_the_engines_answer(heliostat: Heliostat, tiny_family: Path, member: str) -> None:
    words = ["--member", member, "--prompt", "add 2 and 3", "--max-tokens", 6, "--dtype", "float32"]
    (answer,) = LLM(tiny_family, members=[member], dtype="float32").generate(
        "add 2 and 3", member=member, max_tokens=6
    )
    assert heliostat("generate", tiny_family, *words).stdout == answer.text + "\n"
    facts = json.loads(heliostat("generate", tiny_family, *words, "--json").stdout)
    assert (facts["answer"], facts["answer_tokens"]) == (answer.text, len(answer.ids))


def test_a_file_of_prompts_comes_back_line_by_line(
    heliostat: Heliostat, tiny_family: Path, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "5"}]
    lines = [{"prompt": "add 1 and 2"}, {"prompt": [*turns, {"role": "user", "content": "again"}]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--member", "code", "--prompt-file", path, "--max-tokens", 4, "--logprobs", 0]
    found = [json.loads(line) for line in heliostat("generate", tiny_family, *words).stdout.splitlines()]
    assert [facts["line"] for facts in found] == [1, 2]
    assert all(len(facts["logprobs"]) == facts["answer_tokens"] <= 4 for facts in found)


def test_sampling_options_reach_the_engine(heliostat: Heliostat, tiny_family: Path) -> None:
    words = ["generate", tiny_family, "--prompt", "add 2 and 3", "--max-tokens", 8, "--ignore-eos"]
    one, same, other = (heliostat(*words, "--temperature", 3, "--seed", seed).stdout for seed in (1, 1, 2))
    assert one == same != other
    forced = heliostat(*words, "--logit-bias", "22=100", "--logit-bias", "23=-100").stdout
    assert forced == "2" * 8 + "\n"
    assert heliostat(*words, "--logit-bias", "22=100", "--stop", "22").stdout == "\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give one of --prompt TEXT and --prompt-file"),
        (["--prompt", "a", "--prompt-file", "b"], "give one of --prompt TEXT and --prompt-file"),
        (["--prompt", "a", "--member", "maht"], "no member 'maht' (did you mean 'math'?)"),
        (["--prompt", "a", "--top-p", "0"], "top_p is 0"),
        (["--prompt", "a", "--logit-bias", "x"], "must be TOKEN=BIAS"),
        (["--prompt", "a", "--logit-bias", "100000=1"], "logit_bias names token ids outside"),
        (["--prompt", "a", "--dtype", "int3"], "dtype 'int3'; allowed are auto, float32, bfloat16"),
        (["--prompt", "word " * 300], "256"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    heliostat: Heliostat, tiny_family: Path, words: list[str], said: str
) -> None:
    assert said in heliostat("generate", tiny_family, *words, status=2).stderr


def test_answers_fit_the_schema_in_a_file(heliostat: Heliostat, tiny_family: Path, tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps({"type": "object", "properties": {"sum": {"enum": [5]}}, "required": ["sum"]}))
    words = ["generate", tiny_family, "--prompt", "add 2 and 3", "--schema", path, "--max-tokens", 99]
    assert heliostat(*words).stdout.startswith("{")
    path.write_text('{"type": "nonsense"}')
    assert "Invalid type: nonsense" in heliostat(*words, status=2).stderr
