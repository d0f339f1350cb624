"""Every row of a table is an Adam of its own, with one second moment."""

import pytest
import torch

from sparsegate.optim.rows import RowAdam
from tests.helpers.tolerances import assert_close

LR, BETA2 = 0.1, 0.9


def row_by_row(table, gradients, *, beta1: float, eps: float = 1e-8):
    """One row after the other, over the steps that it has a gradient in; float64."""
    table = table.double().clone()
    for row in range(len(table)):
        first, second, count = torch.zeros(table.shape[1], dtype=torch.float64), 0.0, 0
        for grad_VD, touched in gradients:
            if row not in touched:
                continue
            grad_D, count = grad_VD[row].double(), count + 1
            first = beta1 * first + (1 - beta1) * grad_D
            second = BETA2 * second + (1 - BETA2) * grad_D.square().mean()
            root = (second / (1 - BETA2**count)).sqrt() + eps
            table[row] -= LR * first / (1 - beta1**count) / root
    return table


def some_gradients(num_steps: int = 8):
    found = []
    for step in range(num_steps):
        touched = sorted({0, *torch.randint(1, 6, (3,)).tolist()} - ({0} if step == 3 else set()))
        grad_VD = torch.zeros(6, 4)
        grad_VD[touched] = torch.randn(len(touched), 4) * 10.0 ** (step % 3 - 1)
        found.append((grad_VD, touched))
    return found


def sparse(grad_VD, touched):
    """Each row in two parts, as words that occur twice."""
    index = torch.tensor([touched * 2])
    values = torch.cat([0.25 * grad_VD[touched], 0.75 * grad_VD[touched]])
    return torch.sparse_coo_tensor(index, values, (6, 4), check_invariants=True)


@pytest.mark.parametrize("beta1", [0.0, 0.8])
@pytest.mark.parametrize("restored", [False, True])
def test_each_row_is_an_adam_over_the_steps_that_touch_it(beta1, restored):
    table = torch.nn.Parameter(torch.randn(6, 4))
    start = table.detach().clone()
    optimizer = RowAdam([table], lr=LR, beta1=beta1, beta2=BETA2)
    gradients = some_gradients()
    for step, (grad_VD, touched) in enumerate(gradients):
        if restored and step == 4:
            saved, optimizer = optimizer.state_dict(), RowAdam([table], lr=LR, beta1=beta1, beta2=BETA2)
            optimizer.load_state_dict(saved)
        before = table.detach().clone()
        table.grad = sparse(grad_VD, touched)
        optimizer.step()
        untouched = [row for row in range(6) if row not in touched]
        assert torch.equal(table[untouched], before[untouched])
    assert_close(table, row_by_row(start, gradients, beta1=beta1), dtype=torch.float32, scale=10)
    assert ("first" in optimizer.state[table]) == bool(beta1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_state_dict_brings_back_every_bit(dtype):
    """Counts in bfloat16 would end at 256."""
    table = torch.nn.Parameter(torch.randn(6, 4, dtype=dtype))
    optimizer, other = RowAdam([table]), RowAdam([table])
    table.grad = sparse(torch.randn(6, 4, dtype=dtype), [0, 2])
    for _ in range(3):
        optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    for key, value in optimizer.state[table].items():
        restored = other.state[table][key]
        assert restored is not value
        assert restored.dtype == value.dtype
        assert torch.equal(restored, value)


def test_where_a_rows_gradients_are_of_one_size_it_is_adam():
    table, other = (torch.nn.Parameter(torch.zeros(2, 4)) for _ in range(2))
    ours = RowAdam([table], lr=LR, beta1=0.8, beta2=BETA2)
    theirs = torch.optim.Adam([other], lr=LR, betas=(0.8, BETA2))
    for step in range(5):
        other.grad = (torch.randint(0, 2, (2, 4)) * 2.0 - 1) * (step + 1)
        table.grad = other.grad.to_sparse(1)
        ours.step()
        theirs.step()
    assert_close(table, other, dtype=torch.float32, scale=10)


def test_a_dense_gradient_is_refused():
    table = torch.nn.Parameter(torch.zeros(2, 4))
    table.grad = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"shape \[2, 4\] is torch.strided; make it sparse"):
        RowAdam([table]).step()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": -1.0}, r"lr \(-1.0\) must not be negative"),
        ({"beta1": 1.0}, r"beta1 \(1.0\) must be at least 0 and below 1"),
        ({"beta2": -0.1}, r"beta2 \(-0.1\) must be at least 0 and below 1"),
        ({"eps": 0.0}, r"eps \(0.0\) must be above 0"),
    ],
)
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        RowAdam([torch.nn.Parameter(torch.zeros(3, 4))], **wrong)
