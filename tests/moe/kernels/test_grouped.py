"""The grouped product: equal to its reference, differentiable to any order, an honest operator."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from sparsegate.moe.kernels import grouped, grouped_mm, reference
from sparsegate.moe.kernels.grouped import grouped_product, grouped_products
from tests.helpers.derivatives import assert_derivatives, off_by_a_factor
from tests.helpers.moe_cases import gradients
from tests.helpers.tolerances import TOLERANCES, assert_close

# Ends of three groups among seven rows: some with empty groups, some with unused rows at the end.
ENDS = {"even": [2, 4, 7], "empty": [0, 4, 4], "one": [0, 7, 7], "unused": [1, 3, 5], "none": [0, 0, 0]}
OPERATORS = {"product": grouped._product, "transposed product": grouped._product, "outer": grouped._outer}
WIDTHS = (5, 2)  # of the left and the right weight
OPTION = {"product": False, "transposed product": True, "outer": WIDTHS[0]}  # the operators' own argument


def operands(num_rows: int = 7, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return (
        torch.randn(num_rows, 4, dtype=dtype, requires_grad=True),
        torch.randn(3, 4, WIDTHS[0], dtype=dtype, requires_grad=True),
    )


def call(operator: str, end_E: Tensor, *operands: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """The operator as a function of tensors."""
    return OPERATORS[operator](*operands, end_E, OPTION[operator], "loop")


def operands_of(operator: str, num_rows: int = 7, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    weights = [(3, 4, width) for width in WIDTHS]
    shapes = {
        "product": [(num_rows, 4), *weights],
        "transposed product": [(num_rows, sum(WIDTHS)), *weights],
        "outer": [(num_rows, 4), (num_rows, sum(WIDTHS))],
    }
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes[operator]]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_values_and_gradients_equal_the_reference(ends, dtype):
    rows, weight = operands(dtype=dtype)
    end_E = torch.tensor(ends)
    cotangent = torch.randn(7, 5, dtype=dtype)
    ours = grouped_product(rows, weight, end_E)
    theirs = reference.grouped_product(rows.double(), weight.double(), end_E)
    assert ours.dtype == dtype
    assert_close(ours, theirs)
    our_gradients = gradients((ours * cotangent).sum(), rows, weight)
    their_gradients = gradients((theirs * cotangent).sum(), rows, weight)
    for our_gradient, their_gradient in zip(our_gradients, their_gradients, strict=True):
        assert_close(our_gradient, their_gradient)


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_the_reference_multiplies_row_by_row(ends):
    rows, weight = operands()
    expected = torch.zeros(7, 5, dtype=torch.float64)
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        for row in range(start, end):
            for column in range(5):
                expected[row, column] = sum(rows[row, d] * weight[expert, d, column] for d in range(4))
    assert_close(reference.grouped_product(rows, weight, torch.tensor(ends)), expected)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_products_with_two_weights_stand_side_by_side(ends, dtype):
    end_E = torch.tensor(ends)
    rows, left, right = inputs = operands_of("product", dtype=dtype)
    cotangent = torch.randn(7, sum(WIDTHS), dtype=dtype)
    ours = grouped_products(rows, left, right, end_E)
    theirs = torch.cat(
        [reference.grouped_product(rows.double(), weight.double(), end_E) for weight in (left, right)], dim=1
    )
    assert ours.dtype == dtype
    assert_close(ours, theirs)
    our_gradients = gradients((ours * cotangent).sum(), *inputs)
    their_gradients = gradients((theirs * cotangent).sum(), *inputs)
    for our_gradient, their_gradient in zip(our_gradients, their_gradients, strict=True):
        # Both weights' parts of a row's gradient are summed in its own dtype.
        assert_close(our_gradient, their_gradient, dtype=dtype, scale=2)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_derivatives_are_those_of_finite_differences(operator, ends):
    assert_derivatives(partial(call, operator, torch.tensor(ends)), *operands_of(operator))


@pytest.mark.parametrize(
    ("operator", "position"),
    [(operator, position) for operator in OPERATORS for position in range(2 if operator == "outer" else 3)],
)
def test_a_factor_planted_in_a_backward_is_caught(operator, position, monkeypatch):
    function, inputs = OPERATORS[operator], operands_of(operator)
    monkeypatch.setattr(function, "_backward_fn", off_by_a_factor(function._backward_fn, position))
    with pytest.raises(GradcheckError):
        assert_derivatives(partial(call, operator, torch.tensor([2, 4, 7])), *inputs)


@pytest.mark.parametrize("needed", [[0], [1], [2], [0, 1], [0, 2], [1, 2]])
@pytest.mark.parametrize("operator", ["product", "transposed product"])
def test_only_the_gradients_that_are_needed_are_computed(operator, needed, monkeypatch):
    end_E, inputs = torch.tensor(ENDS["even"]), operands_of(operator)
    expected = torch.autograd.grad(call(operator, end_E, *inputs).square().sum(), [inputs[i] for i in needed])
    widths, outer = [], grouped._outer
    monkeypatch.setattr(grouped, "_outer", lambda *args: widths.append(args[1].shape[1]) or outer(*args))
    leaves = [t.detach().requires_grad_(i in needed) for i, t in enumerate(inputs)]
    call(operator, end_E, *leaves).square().sum().backward()
    for index, gradient in zip(needed, expected, strict=True):
        assert_close(leaves[index].grad, gradient)
    assert sum(widths) == sum(WIDTHS[index - 1] for index in needed if index)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("num_rows", "ends"), [(7, [1, 3, 5]), (0, [0, 0, 0])], ids=["empty and unused", "no rows"]
)
def test_the_operators_keep_what_they_register(operator, num_rows, ends):
    inputs = operands_of(operator, num_rows=num_rows, dtype=torch.float32)
    torch.library.opcheck(OPERATORS[operator], (*inputs, torch.tensor(ends), OPTION[operator], "loop"))


@pytest.mark.parametrize("ends", [[1, 3, 5], [0, 7, 7]])
def test_those_of_torchs_product_keep_what_they_register(ends):
    rows_ND, weight_EDH, grad_NH = torch.randn(7, 8), torch.randn(3, 8, 4), torch.randn(7, 4)
    end_E = torch.tensor(ends)
    torch.library.opcheck(grouped_mm._product, (rows_ND.requires_grad_(), weight_EDH.requires_grad_(), end_E))
    torch.library.opcheck(grouped_mm._outer, (rows_ND.detach(), grad_NH, end_E))


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_memory_layout_makes_no_difference(dtype):
    rows, weight = operands(dtype=dtype)
    end_E = torch.tensor([2, 4, 6])
    strided = (
        rows.detach().T.contiguous().T.requires_grad_(),
        weight.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(),
    )
    every_other = torch.zeros(7, 10, dtype=dtype)[:, ::2]
    every_other.copy_(torch.randn(7, 5))
    assert not any(t.is_contiguous() for t in (*strided, every_other))
    for a, b in (strided, (rows, weight)):
        for cotangent in (every_other, torch.ones(1, 1, dtype=dtype).expand(7, 5)):
            out = grouped_product(a, b, end_E)
            expected = grouped_product(rows, weight, end_E)
            ours = torch.autograd.grad(out, (a, b), cotangent)
            theirs = torch.autograd.grad(expected, (rows, weight), cotangent.contiguous())
            for value, other in zip((out, *ours), (expected, *theirs), strict=True):
                assert_close(value, other)


def test_rows_past_the_last_end_reach_nothing_even_if_they_are_nan():
    rows, weight = operands()
    rows = rows.detach().index_fill(0, torch.tensor([5, 6]), torch.nan).requires_grad_()
    out = grouped_product(rows, weight, torch.tensor([1, 3, 5]))
    grad_rows, grad_weight = torch.autograd.grad(
        out, (rows, weight), torch.ones(7, 5).index_fill(0, torch.tensor([5, 6]), torch.nan).double()
    )
    assert not out[5:].any()
    assert not grad_rows[5:].any()
    assert grad_weight.isfinite().all()


def test_autocast_casts_all_but_float64():
    for dtype, expected in ((torch.float32, torch.bfloat16), (torch.float64, torch.float64)):
        rows, weight = operands(dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = grouped_product(rows, weight, torch.tensor([2, 4, 7]))
            assert out.dtype == expected == (rows @ weight[0]).dtype
        assert {g.dtype for g in gradients(out.sum(), rows, weight)} == {dtype}
