"""Recycled memory: taken again when nobody looks at it any more, and not before."""

import gc
import mmap
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from sparsegate.moe.kernels import memory
from sparsegate.moe.kernels.memory import recycled_empty
from sparsegate.moe.layer import MoE
from sparsegate.moe.losses import importance_loss, load_loss

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


def test_memory_that_nobody_wants_is_given_back_even_if_small_tensors_are_all_that_is_asked_for():
    del_me = recycled_empty(*LARGE, dtype=torch.float32)
    del del_me
    for _ in range(memory._PATIENCE + 2):
        recycled_empty(3, dtype=torch.float32)
    assert not any(memory._BLOCKS.free.values())
    assert memory._BLOCKS.num_blocks == 0


def test_a_step_of_many_tensors_finds_them_all_again(monkeypatch):
    monkeypatch.setattr(memory, "_SMALLEST", 1 << 12)
    addresses = []
    for _ in range(3):
        step = [recycled_empty(1 << 12, dtype=torch.float32) for _ in range(1000)]
        addresses.append({tensor.data_ptr() for tensor in step})
        del step
    assert addresses[0] == addresses[1] == addresses[2]


def test_a_system_without_large_pages_is_no_error(monkeypatch):
    monkeypatch.setattr(memory.mmap, "MADV_HUGEPAGE", 12345)
    with pytest.raises(OSError, match="Invalid argument"):
        mmap.mmap(-1, 1 << 20).madvise(12345)
    assert recycled_empty(*LARGE, dtype=torch.float32).fill_(1).all()


def test_where_memory_is_short_what_is_free_is_given_back_first(monkeypatch):
    del_me = recycled_empty(*LARGE, dtype=torch.float32)
    del del_me

    class Short(mmap.mmap):
        def __new__(cls, *args, **options):
            if any(memory._BLOCKS.free.values()):
                raise OSError("Cannot allocate memory")
            return mmap.mmap(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(memory, "mmap", SimpleNamespace(**{**vars(mmap), "mmap": Short}))
        assert recycled_empty(9, 1 << 20, dtype=torch.float32).fill_(1).all()
    assert memory._BLOCKS.num_blocks == 1


def test_recycling_can_be_turned_off_which_gives_what_is_free_back():
    del_me = recycled_empty(*LARGE, dtype=torch.float32)
    del del_me
    try:
        memory.set_recycling(False)
        assert memory._BLOCKS.num_blocks == 0
        recycled_empty(*LARGE, dtype=torch.float32)
        assert memory._BLOCKS.num_blocks == 0
    finally:
        memory.set_recycling(True)


AT_EXIT = """
import atexit

@atexit.register  # before the first tensor, so called after what that registers
def still_alive():
    recycled_empty(5, 1 << 20, dtype=torch.float32).fill_(7)
    print(kept.unique().tolist())

import torch
from sparsegate.moe.kernels.memory import recycled_empty

kept = recycled_empty(5, 1 << 20, dtype=torch.float32).fill_(1)
"""


def test_memory_of_a_living_tensor_is_not_taken_as_the_process_leaves():
    done = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True, check=True)
    assert done.stdout == "[1.0]\n"


def test_a_small_tensor_is_torchs_own():
    recycled_empty(3, 4, dtype=torch.float32)
    assert memory._BLOCKS.num_blocks == 0


def test_sizes_are_rounded_up_by_an_eighth_at_most():
    for num_bytes in (1 << 24, (1 << 24) + 1, 3 << 23, 123_456_789, 987_654_321):
        assert num_bytes <= memory._rounded(num_bytes) <= 1.13 * num_bytes


def test_threads_take_and_give_back_at_the_same_time_and_never_the_same_memory():
    errors = []

    def take_many(offset):
        try:
            held = recycled_empty(*LARGE, dtype=torch.float32)[0]
            for size in range(300):
                held.fill_(offset + size)
                taken = recycled_empty((1 << 22) + ((offset + size) % 97 << 19), dtype=torch.float32)
                taken[: 1 << 10] = -1
                assert held.eq(offset + size).all()
                held = taken[: 1 << 10]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=take_many, args=(31 * offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.parametrize("kernel", ["threaded", "loop"])
def test_the_layer_reads_nothing_of_what_was_there_and_writes_into_nothing_that_is_held(kernel, monkeypatch):
    """Every tensor of 64 bytes is recycled, and is full of NaN when it is taken again."""

    class Spoiled(memory._Blocks):
        def give_back(self, block):
            block[:] = b"\xff" * len(block)
            super().give_back(block)

    def steps():
        torch.manual_seed(0)
        moe = MoE.noisy_topk(width=8, hidden=16, num_experts=6, k=2)
        moe.experts.kernel = kernel
        torch.nn.init.normal_(moe.gate.w_gate)
        mask_T = torch.arange(30) % 4 > 0
        for _ in range(4):
            x_TD = torch.randn(30, 8, requires_grad=True)
            y_TD, routing = moe(x_TD, mask_T)
            loss = y_TD.square().sum() + load_loss(routing) + importance_loss(routing)
            yield y_TD, *torch.autograd.grad(loss, (x_TD, *moe.parameters()))

    expected = list(steps())
    monkeypatch.setattr(memory, "_SMALLEST", 64)
    monkeypatch.setattr(memory, "_BLOCKS", Spoiled())
    held = list(steps())
    assert any(memory._BLOCKS.free.values())
    for ours, theirs in zip(held, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
