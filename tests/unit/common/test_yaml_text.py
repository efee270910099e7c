"""YAML: written values are read back unchanged, and numbers are read as numbers."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finray.training.common.yaml_text import dump_yaml, load_yaml

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(),
    st.from_regex(r"[-+]?[0-9]{0,3}\.?[0-9]{0,2}[eE][-+]?[0-9]{1,3}", fullmatch=True),
)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "1.e-4", "+.001e-1", "0.1e-3"])
def test_numbers_in_any_notation(text: str) -> None:
    rate = load_yaml(f"rate: {text}")["rate"]
    assert isinstance(rate, float) and math.isclose(rate, 1e-4)
    assert load_yaml(f"rate: '{text}'") == {"rate": text}


@pytest.mark.parametrize("text", ["e5", "1e", "1e-4x", "support-1e-4", "1e-4 of it", "."])
def test_text_stays_text(text: str) -> None:
    assert load_yaml(f"name: {text}") == {"name": text}


@given(st.dictionaries(st.text(), SCALARS))
def test_what_is_written_is_read_back(values: dict[str, object]) -> None:
    loaded = load_yaml(dump_yaml(values))
    assert loaded == values
    assert [type(value) for value in loaded.values()] == [type(value) for value in values.values()]
