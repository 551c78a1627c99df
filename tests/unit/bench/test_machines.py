"""GPUs: names that there are, shapes that fit, and passes that take as long as the slower of bytes and sums."""

import pytest

from heliostat.bench.costs import PARTS, Fitted, Work
from heliostat.bench.machines import (
    GPUS,
    MODELS,
    Efficiency,
    Roofline,
    assumptions,
    machine,
    measured_machine,
    model_named,
)
from heliostat.errors import Refused

BARE = Efficiency(bandwidth=1.0, flops=1.0, step_seconds=0.0, pass_seconds=0.0)


def test_a_shape_has_as_many_parameters_as_its_name_says() -> None:
    billions = {name: model_named(name).parameters / 1e9 for name in MODELS}
    assert billions == pytest.approx({"1b": 1.24, "3b": 3.21, "8b": 8.03, "70b": 70.6}, rel=0.01)


def test_one_row_takes_a_reading_of_the_weights_and_a_long_prompt_its_sums() -> None:
    config, gpu = model_named("8b"), GPUS["h100-80"]
    costs = Roofline(gpu, config, BARE)
    read = 2 * (config.parameters - config.vocabulary * config.width)
    assert costs.seconds([Work("w", rows=1, sampled=1)]) == pytest.approx(read / gpu.bandwidth, rel=0.001)
    prompt = costs.seconds([Work("w", prompt_rows=2048, sampled=1)])
    sums = 2 * 2048 * (config.parameters - 2 * config.vocabulary * config.width)
    assert prompt == pytest.approx(sums / gpu.flops, rel=0.001)
    assert costs.seconds([Work("w", rows=1)] * 3) == pytest.approx(3 * costs.seconds([Work("w", rows=1)]))


def test_what_is_unknown_or_does_not_fit_is_told() -> None:
    with pytest.raises(Refused, match="no GPU 'h100'.*did you mean 'h100-80'.*rtx4090-24"):
        machine("h100", model_named("8b"))
    with pytest.raises(Refused, match="no model '9b'.*70b"):
        model_named("9b")
    with pytest.raises(Refused, match="70.6 billion parameters takes 141 GB in bfloat16; h100-80 has 80"):
        machine("h100-80", model_named("70b"))


def test_a_machine_has_pages_in_what_the_weights_leave() -> None:
    made = machine("a100-80", model_named("8b"))
    assert made.room is not None and made.page_bytes == 16 * 2 * 32 * 8 * 128 * 2
    assert "assumed, not measured" in assumptions()


def test_a_measured_machine_is_what_its_table_says() -> None:
    about = {"shape": "24M", "threads": 1, "page_bytes": 1024}
    made = measured_machine(Fitted(dict.fromkeys(PARTS, 0.0), about=about))
    assert made.page_bytes == 1024 and made.name == "24M as measured here, 1 thread"
    with pytest.raises(Refused, match="does not say of what it is"):
        measured_machine(Fitted(dict.fromkeys(PARTS, 0.0)))
