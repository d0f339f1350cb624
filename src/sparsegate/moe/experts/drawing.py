"""Initial weights of experts: normal numbers, for each expert from a stream of its own."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# Numbers that are drawn at once: in the cache when they are copied, by this thread alone.
_BLOCK = 1 << 15
# Numbers that are worth another thread.
_LEAST_OF_THREAD = 1 << 20
# Of each thread: none is left with much at the end, and an interrupt does not wait for long.
_TURNS = 32


@dataclass(frozen=True, kw_only=True)
class Normal:
    """What a stack of weights [E, ...] is to be filled with: normal numbers of mean 0 and a deviation."""

    stack: Tensor
    std: float


def draw_experts(draws: Sequence[Normal], *, own: range) -> None:
    """Fill stacks, whose first axes have the experts `own`, in place.

    An expert's weights follow from its number, the stacks' shapes, and one number that is drawn from torch's
    generator: they are the same in any company and on any device. They are made on the CPU, in float32 at
    least, by as many threads as torch has; beside the stacks each of these holds a block of them.

    ValueError: stacks that are spread over processes already, of which the rows here have no numbers.
    """
    kinds = {type(draw.stack.detach()) for draw in draws}
    if FakeTensor in kinds or any(draw.stack.is_meta for draw in draws):
        return
    if kinds != {Tensor}:
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(f"experts: weights ({found}) cannot be drawn; reset_parameters before sharding them")
    base = int(torch.randint(1 << 62, (), device="cpu"))
    numbers = sum(draw.stack.numel() for draw in draws)
    stds = [draw.std for draw in draws]
    rows = [draw.stack.detach().view(len(own), -1).unbind() for draw in draws]
    weights = list(zip(*rows, strict=True))  # of each expert
    num_threads = min(torch.get_num_threads(), len(own), numbers // _LEAST_OF_THREAD)
    if num_threads <= 1:
        _draw(weights, stds, own, base)
        return
    num_turns = num_threads * _TURNS
    with ThreadPoolExecutor(num_threads) as threads:
        turns = [
            threads.submit(_draw, weights[turn::num_turns], stds, own[turn::num_turns], base)
            for turn in range(num_turns)
        ]
        try:
            for turn in turns:
                turn.result()
        finally:
            threads.shutdown(cancel_futures=True)


def expert_seed(base: int, expert: int) -> int:
    """A seed of 32 bits, of which torch looks at no more: with one base different for every expert.

    base: of 64 bits. If both were hashed into 32 bits, two of 131,072 experts would most likely be equal.
    """
    high, low = divmod(base, 1 << 32)
    return _mixed(_mixed(expert ^ low) ^ high)


def _mixed(number: int) -> int:
    """A permutation of the numbers of 32 bits (lowbias32, C. Wellons 2018)."""
    number = ((number ^ number >> 16) * 0x7FEB352D) & 0xFFFFFFFF
    number = ((number ^ number >> 15) * 0x846CA68B) & 0xFFFFFFFF
    return number ^ number >> 16


def _draw(
    weights: Sequence[tuple[Tensor, ...]], stds: Sequence[float], experts: Sequence[int], base: int
) -> None:
    """weights: those of each of the experts, flat."""
    generator = torch.Generator()
    for expert, own_weights in zip(experts, weights, strict=True):
        generator.manual_seed(expert_seed(base, expert))
        for weight, std in zip(own_weights, stds, strict=True):
            dtype = torch.promote_types(weight.dtype, torch.float32)
            in_place = weight.is_cpu and weight.dtype == dtype
            for block in weight.split(_BLOCK):
                drawn = block if in_place else torch.empty(len(block), dtype=dtype, device="cpu")
                drawn.normal_(0, std, generator=generator)
                if not in_place:
                    block.copy_(drawn)
