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
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensor
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.get_autocast_dtype(device))
