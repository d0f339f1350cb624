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

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    expert=st.lists(st.integers(0, 6), min_size=1, max_size=12),
    width=st.integers(1, 70),
    hidden=st.integers(1, 70),
)
def test_each_row_is_multiplied_by_its_expert(dtype, expert, width, hidden):
    expert_N = torch.tensor(sorted(expert))
    rows_ND = torch.randn(len(expert), width).to(dtype)
    weight_EDH = (torch.randn(7, width, hidden) / width**0.5).to(dtype)
    found_NH = row_by_row.products(rows_ND, weight_EDH, expert_N)
    exact_NH = torch.einsum("nd,ndh->nh", rows_ND.double(), weight_EDH[expert_N].double())
    assert found_NH.dtype == dtype
    assert_close(found_NH, exact_NH, dtype=dtype, scale=4)


@pytest.mark.parametrize(
    ("rows", "matrix", "dtype", "is_chosen"),
    [
        (0, (512, 1024), torch.float32, False),
        (4, (512, 1024), torch.float32, True),
        (5, (512, 1024), torch.float32, False),
        (5, (512, 1024), torch.bfloat16, True),
        (16, (128, 128), torch.float32, True),
        (17, (128, 128), torch.float32, False),
        (1, (1024, 4096), torch.float32, False),
        (1, (1024, 4096), torch.bfloat16, True),
    ],
)
@pytest.mark.parametrize("num_used", [1, 3])
def test_few_rows_of_small_matrices_are_chosen(rows, matrix, dtype, is_chosen, num_used):
    weight_EDH = torch.empty(4, *matrix, dtype=dtype)
    assert row_by_row.suits(rows * num_used, num_used, weight_EDH, dtype) == is_chosen


@pytest.mark.parametrize(
    ("weight_EDH", "dtype"),
    [
        (torch.empty(2, 8, 4, dtype=torch.float64), torch.float64),
        (torch.empty(2, 8, 4), torch.bfloat16),
        (torch.empty(2, 4, 8).transpose(1, 2), torch.float32),
        (torch.empty(2, 0, 4), torch.float32),
    ],
    ids=["float64", "to be cast", "transposed", "empty"],
)
def test_what_it_cannot_do_is_not_chosen(weight_EDH, dtype):
    assert not row_by_row.suits(2, 1, weight_EDH, dtype)


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_a_layer_goes_row_by_row_where_rows_are_few(capability):
    few, many = (
        a_routing(torch.zeros(n, 1, dtype=torch.int64), torch.rand(n, 1), num_experts=2) for n in (2, 40)
    )
    with (
        patch.object(row_by_row, "products", wraps=row_by_row.products) as products,
        patch.object(torch.backends.cpu, "get_cpu_capability", return_value=capability),
    ):
        for routing, calls in ((few, 2), (many, 2)):
            expert_by_expert.forward(
                torch.randn(len(routing.pairs_T), 8),
                torch.randn(2, 8, 16),
                torch.randn(2, 16, 8),
                routing.weight_N,
                plan_rows(routing),
                activation="relu",
                dtype=torch.float32,
                keep=False,
            )
            assert products.call_count == calls


def test_no_other_processor_is_asked_to():
    with patch.object(torch.backends.cpu, "get_cpu_capability", return_value="DEFAULT"):
        assert not row_by_row.suits(2, 1, torch.empty(2, 8, 4), torch.float32)
