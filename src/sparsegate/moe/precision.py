"""What numbers are computed as: where the layer follows autocast, and where not; the smallest ones."""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor


def autocast_off(device: torch.device) -> AbstractContextManager[object]:
    """Compute in the dtypes that the tensors have. The meta device knows no autocast: nothing to leave."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Numbers nearer to 0 than the smallest normal one count as 0, in this thread and those it starts.

    Threads that torch had started before keep computing with them, and those it starts here never do. In a
    matrix product they take a CPU fifty times as long where two in a hundred are such, and there are as many
    in the gradients of a saturated sigmoid, and of eq. 9 where the noise is small.
    """
    before = sys.float_info.min / 2 == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def as_autocast(tensor: Tensor) -> Tensor:
    """Cast as torch does for a product under autocast: to its dtype where it is on, float64 never."""
    return tensor.to(autocast_dtype(tensor))


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that `as_autocast` casts to."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensor.dtype
    return tensor.dtype if tensor.dtype == torch.float64 else torch.get_autocast_dtype(device)


def product_dtype(x_TD: Tensor, *weights: Tensor) -> torch.dtype:
    """The dtype that products are computed in. ValueError where input and weights differ."""
    x_dtype, weight_dtypes = autocast_dtype(x_TD), {autocast_dtype(w) for w in weights}
    if {x_dtype} != weight_dtypes:
        found = ", ".join(sorted(str(w.dtype) for w in weights))
        raise ValueError(
            f"x ({x_TD.dtype}) must have the dtype of the experts' weights ({found}): "
            "cast one of them, or use torch.autocast"
        )
    return x_dtype
