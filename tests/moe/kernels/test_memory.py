"""Recycled memory: taken again when nobody looks at it any more, and not before."""

import gc
import sys
import threading

import pytest
import torch

from sparsegate.moe.kernels import memory
from sparsegate.moe.kernels.memory import recycled_empty

LARGE = (5, 1 << 20)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is recycled on Linux alone")


@pytest.fixture(autouse=True)
def blocks_of_its_own(monkeypatch):
    """Without the poison, which would make every tensor torch's own."""
    monkeypatch.setattr(memory, "_BLOCKS", memory._Blocks())
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_tensor_has_the_shape_and_dtype_asked_for_and_can_be_written(dtype):
    tensor = recycled_empty(*LARGE, dtype=dtype)
    assert tensor.shape == LARGE
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    assert tensor.fill_(3).sum(dtype=torch.float64) == 3 * tensor.numel()


def test_memory_is_taken_again_after_the_tensor_has_died():
    first = recycled_empty(*LARGE, dtype=torch.float32)
    address = first.data_ptr()
    del first
    assert recycled_empty(*LARGE, dtype=torch.float32).data_ptr() == address


@pytest.mark.parametrize("keep", [lambda t: t[1:2, ::7], lambda t: t.numpy(), lambda t: t.untyped_storage()])
def test_memory_is_not_taken_while_anything_refers_to_it(keep):
    first = recycled_empty(*LARGE, dtype=torch.float32)
    address, kept = first.data_ptr(), keep(first)
    del first
    gc.collect()
    assert recycled_empty(*LARGE, dtype=torch.float32).data_ptr() != address
    del kept


def test_a_gradient_that_is_set_to_none_gives_its_memory_to_the_next():
    weight = torch.zeros(LARGE, requires_grad=True)

    class Fill(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            return weight.new_zeros(())

        @staticmethod
        def backward(ctx, grad):
            return recycled_empty(*LARGE, dtype=torch.float32).fill_(1)

    addresses = set()
    for _ in range(3):
        weight.grad = None
        Fill.apply(weight).backward()
        addresses.add(weight.grad.data_ptr())  # autograd takes the tensor as it is
    assert len(addresses) == 1
    kept = weight.grad
    Fill.apply(weight).backward()
    assert kept is weight.grad
    assert kept.eq(2).all()


def test_memory_that_nobody_wants_is_given_back():
    del_me = recycled_empty(*LARGE, dtype=torch.float32)
    del del_me
    for _ in range(memory._PATIENCE + 2):
        recycled_empty(9, 1 << 20, dtype=torch.float32)
    assert [size for size, freed in memory._BLOCKS.free.items() if freed] == [memory._rounded(9 << 22)]


def test_a_small_tensor_is_torchs_own():
    recycled_empty(3, 4, dtype=torch.float32)
    assert memory._BLOCKS.num_requests == 0


def test_sizes_are_rounded_up_by_an_eighth_at_most():
    for num_bytes in (1 << 24, (1 << 24) + 1, 3 << 23, 123_456_789, 987_654_321):
        assert num_bytes <= memory._rounded(num_bytes) <= 1.13 * num_bytes


def test_threads_take_and_give_back_at_the_same_time():
    errors = []

    def take_many(offset):
        try:
            for size in range(300):
                recycled_empty((1 << 22) + ((offset + size) % 97 << 19), dtype=torch.float32)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=take_many, args=(31 * offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
