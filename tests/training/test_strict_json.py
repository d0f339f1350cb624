import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsegate.training.strict_json import (
    MAX_JSON_BYTES,
    MAX_JSON_DEPTH,
    is_count,
    parse_json,
    to_json_bytes,
)

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(values)
def test_what_is_written_is_read_back_here_and_elsewhere_with_types_and_order(value) -> None:
    data = to_json_bytes(value, name="state")
    assert repr(parse_json(data)) == repr(value)
    assert repr(json.loads(data)) == repr(value)


@pytest.mark.parametrize(
    ("value", "entry"),
    [
        ({"curve": [1.0, math.nan]}, "state.curve[1] is nan"),
        ({"best": {"loss": -math.inf}}, "state.best.loss is -inf"),
        ({"betas": (0.9, 0.999)}, "state.betas is a tuple"),
        ({"seen": {1: 2}}, "state.seen has the key 1"),
        ({"x": b"bytes"}, "state.x is a bytes"),
    ],
)
def test_what_json_would_change_is_refused_by_its_name(value, entry) -> None:
    with pytest.raises(ValueError, match="^[^\n]+$") as refusal:
        to_json_bytes(value, name="state")
    assert entry in str(refusal.value)


def test_a_count_is_an_integer_of_zero_or_more() -> None:
    assert [value for value in (0, 7, -1, True, False, 1.0, "1", None) if is_count(value)] == [0, 7]


def test_what_is_deep_or_in_itself_is_refused() -> None:
    value: list = []
    value.append(value)
    with pytest.raises(ValueError, match=f"more than {MAX_JSON_DEPTH} deep or in itself"):
        to_json_bytes(value, name="state")


def test_nothing_is_written_that_could_not_be_read() -> None:
    with pytest.raises(ValueError, match="use tensors"):
        to_json_bytes("x" * MAX_JSON_BYTES, name="state")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"nul",
        b"{'a': 1}",
        b'{"a": 1} x',
        b'{"a": NaN}',
        b"[-Infinity]",
        b"[1e999]",
        b'{"a": 1, "a": 1}',
        b'{"a": {"b": 1, "\\u0062": 2}}',
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        b'"\x00"',
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b"9" * 5_000,
        b" " * (MAX_JSON_BYTES + 1),
    ],
    ids=lambda data: repr(data[:20]),
)
def test_what_has_no_single_meaning_is_refused_in_one_line(data) -> None:
    with pytest.raises(ValueError, match="^[^\n]+$"):
        parse_json(data)
