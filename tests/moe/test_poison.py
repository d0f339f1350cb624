"""The poison works: a layer that reads what it has not written is found out."""

from functools import partial

import pytest
import torch

from sparsegate.moe.kernels import choice, reference, unfused
from sparsegate.moe.kernels.sink import with_whole_gradients
from tests.helpers.moe_cases import a_batch, a_moe
from tests.moe.test_layer import (
    test_padding_leaves_no_trace_even_if_it_is_nan as padding_leaves_no_trace,
)


def test_uninitialised_memory_is_not_a_number():
    x = torch.ones(3)
    for made in (torch.empty(3), x.new_empty(3), torch.empty_like(x), torch.empty_strided((3,), (1,))):
        assert made.isnan().all()
    assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


def forgets_the_unused_rows(rows_ND, weight_EDH, end_E):
    """The reference product, without the zeros past the last end."""
    out_NH = reference.grouped_product(rows_ND, weight_EDH, end_E)
    num_used = int(end_E[-1])
    return torch.cat([out_NH[:num_used], torch.empty_like(out_NH[num_used:])])


def test_a_product_that_leaves_rows_unwritten_is_caught(monkeypatch):
    faulty = with_whole_gradients(partial(unfused.feed_forward, product=forgets_the_unused_rows))
    kernel = choice.KERNELS["threaded"]._replace(load=lambda: faulty)
    monkeypatch.setitem(choice.KERNELS, "threaded", kernel)
    moe, batch = a_moe(), a_batch(7)
    assert moe(batch.x_TD)[0].isfinite().all()  # all rows are used: nothing to see yet
    with pytest.raises(AssertionError):
        padding_leaves_no_trace()
