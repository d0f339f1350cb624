"""Products of few rows for each expert: what they are, and when they are chosen."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsegate.moe.dispatch import plan_rows
from sparsegate.moe.kernels import expert_by_expert, row_by_row
from tests.helpers.moe_cases import a_routing
from tests.helpers.tolerances import assert_close

FLOAT, HALF = torch.float32, torch.bfloat16


@pytest.fixture(params=["AVX2", "AVX512"], autouse=True)
def capability(request):
    """Of whatever processor runs the tests: the kernel's plain form computes the same."""
    with patch.object(torch.backends.cpu, "get_cpu_capability", return_value=request.param) as found:
        yield found


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@given(
    expert=st.lists(st.integers(0, 6), min_size=1, max_size=12),
    num_inputs=st.integers(1, 70),
    num_outputs=st.integers(1, 70),
)
def test_each_row_is_multiplied_by_its_expert(dtype, expert, num_inputs, num_outputs):
    expert_N = torch.tensor(sorted(expert))
    rows_ND = torch.randn(len(expert), num_inputs).to(dtype)
    weight_EDH = (torch.randn(7, num_inputs, num_outputs) / num_inputs**0.5).to(dtype)
    found_NH = row_by_row.products(rows_ND, weight_EDH, expert_N)
    exact_NH = torch.einsum("nd,ndh->nh", rows_ND.double(), weight_EDH[expert_N].double())
    assert found_NH.dtype == dtype
    assert_close(found_NH, exact_NH, dtype=dtype, scale=4)


@pytest.mark.parametrize(
    ("counts", "matrix", "dtype", "is_chosen"),
    [
        ([0, 0], (8, 8), FLOAT, False),
        ([4, 0], (512, 1024), FLOAT, True),
        ([4, 4], (512, 1024), FLOAT, True),
        ([5, 0], (512, 1024), FLOAT, False),
        ([5, 4], (512, 1024), FLOAT, True),
        ([5, 0], (512, 1024), HALF, True),
        ([12, 12], (128, 128), FLOAT, True),
        ([13, 12], (128, 128), FLOAT, False),
        ([0, 1], (1024, 4096), FLOAT, False),
        ([0, 1], (1024, 4096), HALF, True),
        ([7, 1, 1, 1], (128, 128), FLOAT, True),
        ([40, 1, 1, 1, 1, 1, 1, 1], (128, 128), FLOAT, False),
    ],
)
def test_experts_of_few_rows_are_chosen(counts, matrix, dtype, is_chosen):
    weights = torch.empty(len(counts), *matrix, dtype=dtype), torch.empty(len(counts), 4, 4, dtype=dtype)
    assert row_by_row.suits(torch.tensor(counts), weights, dtype) == is_chosen
    assert row_by_row.suits(torch.tensor(counts), weights[::-1], dtype) == is_chosen


@pytest.mark.parametrize(
    ("weight_EDH", "dtype"),
    [
        (torch.empty(2, 8, 4, dtype=torch.float64), torch.float64),
        (torch.empty(2, 8, 4), HALF),
        (torch.empty(2, 4, 8).transpose(1, 2), FLOAT),
        (torch.empty(2, 0, 4), FLOAT),
    ],
    ids=["float64", "to be cast", "transposed", "empty"],
)
def test_what_it_cannot_do_is_not_chosen(weight_EDH, dtype):
    right = torch.empty(2, 8, 4, dtype=dtype)
    count_E = torch.tensor([1, 1])
    assert row_by_row.suits(count_E, [torch.empty(2, 8, 4)], FLOAT)
    assert not row_by_row.suits(count_E, [weight_EDH], dtype)
    assert not row_by_row.suits(count_E, [right, weight_EDH], dtype)


def test_no_other_processor_is_asked_to(capability):
    capability.return_value = "DEFAULT"
    assert not row_by_row.suits(torch.tensor([1, 1]), [torch.empty(2, 8, 4)], FLOAT)


@given(num_rows=st.integers(0, 40), widths=st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_rows_are_taken_in_turn_and_all_of_them(num_rows, widths):
    with patch.object(row_by_row, "_NUMBERS_AT_ONCE", 12):
        slices = list(row_by_row.in_turn(num_rows, *widths))
    assert [row for rows in slices for row in range(num_rows)[rows]] == list(range(num_rows))
    assert all((rows.stop - rows.start) * max(widths) <= 12 for rows in slices)


@pytest.mark.parametrize(("num_rows", "num_calls"), [(2, 2), (9, 4), (40, 0)])
def test_a_layer_goes_row_by_row_where_rows_are_few(num_rows, num_calls):
    routing = a_routing(torch.zeros(num_rows, 1, dtype=torch.int64), torch.rand(num_rows, 1), num_experts=2)
    with (
        patch.object(row_by_row, "products", wraps=row_by_row.products) as products,
        patch.object(row_by_row, "_NUMBERS_AT_ONCE", 16 * 5),
    ):
        y_TD, _ = expert_by_expert.forward(
            x_TD := torch.randn(num_rows, 8),
            w_in_EDH := torch.randn(2, 8, 16),
            w_out_EHD := torch.randn(2, 16, 8),
            routing.weight_N,
            plan_rows(routing),
            activation="relu",
            dtype=FLOAT,
            keep=False,
        )
    assert products.call_count == num_calls
    expected_TD = (x_TD @ w_in_EDH[0]).relu() @ w_out_EHD[0] * routing.weight_N[:, None]
    assert_close(y_TD, expected_TD.double(), dtype=FLOAT, scale=30)
