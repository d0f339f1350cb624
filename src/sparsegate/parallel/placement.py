"""Which experts stand on which rank, and what else is shared out."""

from itertools import pairwise

import torch
from torch import Tensor


def split(number: int, num_parts: int) -> list[range]:
    """0 to `number - 1` in consecutive parts, as even as they can be: the first ones have one more."""
    each, more = divmod(number, num_parts)
    first = [part * each + min(part, more) for part in range(num_parts + 1)]
    return [range(a, b) for a, b in pairwise(first)]


def experts_of(rank: int, *, num_experts: int, num_ranks: int) -> range:
    """The experts of a rank: `split`, so that groups of experts stay together.

    Where `num_ranks` divides the number of groups of a hierarchy, each group stands on one rank. ValueError:
    fewer experts than ranks.
    """
    if num_ranks > num_experts:
        raise ValueError(
            f"ranks that share the experts ({num_ranks}) must not exceed num_experts ({num_experts}); "
            "start fewer processes, or give the mesh fewer expert ranks and more copies"
        )
    return split(num_experts, num_ranks)[rank]


def first_experts(*, num_experts: int, num_ranks: int, device: torch.device) -> Tensor:
    """The first expert of each rank, and then `num_experts`: int64 [W + 1]. No copy from the host."""
    rank_W1 = torch.arange(num_ranks + 1, device=device)
    return rank_W1 * (num_experts // num_ranks) + rank_W1.clamp_max(num_experts % num_ranks)
