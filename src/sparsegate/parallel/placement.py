"""Which experts stand on which rank."""

import torch
from torch import Tensor


def experts_of(rank: int, *, num_experts: int, num_ranks: int) -> range:
    """The experts of a rank: consecutive, so that groups of experts stay together; as even as they can be.

    The first ranks have one more where they do not divide evenly. Where `num_ranks` divides the number of
    groups of a hierarchy, each group stands on one rank. ValueError: fewer experts than ranks.
    """
    if num_ranks > num_experts:
        raise ValueError(
            f"ranks that share the experts ({num_ranks}) must not exceed num_experts ({num_experts}); "
            "start fewer processes, or give the mesh fewer expert ranks and more copies"
        )
    return range(
        _first(rank, num_experts=num_experts, num_ranks=num_ranks),
        _first(rank + 1, num_experts=num_experts, num_ranks=num_ranks),
    )


def first_experts(*, num_experts: int, num_ranks: int, device: torch.device) -> Tensor:
    """The first expert of each rank, and then `num_experts`: int64 [W + 1]. No copy from the host."""
    rank_W1 = torch.arange(num_ranks + 1, device=device)
    return rank_W1 * (num_experts // num_ranks) + rank_W1.clamp_max(num_experts % num_ranks)


def _first(rank: int, *, num_experts: int, num_ranks: int) -> int:
    return rank * (num_experts // num_ranks) + min(rank, num_experts % num_ranks)
