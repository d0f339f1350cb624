"""Where the layer follows autocast, and where it does not."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_off(device: torch.device) -> AbstractContextManager[object]:
    """Compute in the dtypes that the tensors have. The meta device knows no autocast: nothing to leave."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


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
