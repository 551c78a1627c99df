"""Formats say what they are called, which shapes they have and what they take."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.errors import Refused
from heliostat.ops.codebook_format import Format

FORMATS = st.builds(
    lambda m, v, vectors: Format(m, v, vectors and vectors * v),
    st.integers(1, 4),
    st.integers(1, 16),
    st.none() | st.integers(1, 40),
)


@given(FORMATS)
def test_a_name_is_read_as_it_was_written(format: Format) -> None:
    assert Format.parse(str(format)) == format


@pytest.mark.parametrize(
    ("name", "bits"), [("m1v4g128", 2.125), ("m1v4g32", 2.5), ("m2v8g128", 2.125), ("m2v4g128", 4.125)]
)
def test_bits_of_a_large_weight_are_the_papers(name: str, bits: float) -> None:
    format = Format.parse(name)
    books = 16 * 256 * format.m * format.v / 4096**2
    assert format.bits(4096, 4096) == pytest.approx(bits + books)


def test_a_group_of_minus_one_is_a_row() -> None:
    assert Format.parse("m1v4g-1") == Format.parse("m1v4grow") == Format(1, 4, None)


@pytest.mark.parametrize(
    "text", ["", "m1v4", "m0v4g128", "m1v4g0", "m1v4g128 ", "v4m1g128", "m1v4g-2", "m1v4g12٣"]
)
def test_what_is_no_format_is_refused_by_name(text: str) -> None:
    with pytest.raises(Refused, match="is no format"):
        Format.parse(text)


def test_a_vector_never_has_two_scales() -> None:
    with pytest.raises(Refused, match="m2v8g12"):
        Format.parse("m2v8g12")


@given(FORMATS, st.integers(1, 300), st.integers(1, 50))
def test_bytes_are_those_of_the_tensors(format: Format, inputs: int, outputs: int) -> None:
    shapes = format.shapes(outputs, inputs)
    size = {"codes": 1, "codebooks": 2, "scales": 2}
    total = 0
    for name, shape in shapes.items():
        count = size[name]
        for each in shape:
            count *= each
        total += count
    assert format.bytes(outputs, inputs) == total
    assert shapes["codes"][1] * format.v >= inputs > (shapes["codes"][1] - 1) * format.v
