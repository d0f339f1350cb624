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
            "start fewer processes, or have more copies of the experts (training.expert-copies)"
        )
    return split(num_experts, num_ranks)[rank]


def words_of(rank: int, *, vocab_size: int, num_ranks: int) -> range:
    """The words of a rank: every `num_ranks`-th one, as vocabularies are sorted, frequent words first.

    ValueError: fewer words than ranks.
    """
    if num_ranks > vocab_size:
        raise ValueError(
            f"ranks that share the vocabulary ({num_ranks}) must not exceed its {vocab_size} words; set "
            "training.vocabulary replicated"
        )
    return range(rank, vocab_size, num_ranks)


def firsts(number: int, num_parts: int, *, device: torch.device) -> Tensor:
    """The first of each part of a `split`, then `number`: int64 [num_parts + 1]. No copy from the host."""
    part_1 = torch.arange(num_parts + 1, device=device)
    return part_1 * (number // num_parts) + part_1.clamp_max(number % num_parts)
