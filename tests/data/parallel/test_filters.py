import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsegate.data.parallel import LengthFilter

lengths = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=30)


@given(several=lengths, max_subwords=st.integers(1, 20), max_ratio=st.floats(1, 5))
def test_each_pair_is_left_out_for_the_first_reason_that_holds(
    several: list[tuple[int, int]], max_subwords: int, max_ratio: float
) -> None:
    keep = LengthFilter(max_subwords=max_subwords, max_ratio=max_ratio)
    both = np.array(several, dtype=np.int64).reshape(-1, 2)
    reasons = keep.reasons(both[:, 0], both[:, 1])
    for number, (first, second) in enumerate(several):
        if 0 in (first, second):
            expected = ["empty"]
        elif first > max_subwords or second > max_subwords:
            expected = ["too_long"]
        elif max(first, second) > max_ratio * min(first, second):
            expected = ["ratio"]
        else:
            expected = []
        assert [reason for reason, refused_N in reasons.items() if refused_N[number]] == expected


@pytest.mark.parametrize(
    ("option", "cause"),
    [
        ({"max_subwords": 0}, r"max_subwords \(0\) must be at least 1"),
        ({"max_ratio": 0.9}, r"max_ratio \(0.9\) must be at least 1"),
        ({"max_ratio": float("inf")}, r"max_ratio \(inf\) must be at least 1, and finite"),
        ({"max_ratio": float("nan")}, r"max_ratio \(nan\) must be at least 1"),
    ],
)
def test_impossible_filters_are_refused(option: dict[str, float], cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        LengthFilter(**option)
