"""The processes of a run, and what they tell each other beside tensors."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from .strict_json import Json, parse_json, to_json_bytes


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of a run. group: None is all of torch's. device: of this rank's tensors."""

    device: torch.device
    group: dist.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def num_ranks(self) -> int:
        return dist.get_world_size(self.group)


def tell_all(value: Json, ranks: Ranks) -> list[Json]:
    """Each rank's value, in the order of the ranks, which all call it together."""
    data = torch.frombuffer(bytearray(to_json_bytes(value, name="value")), dtype=torch.uint8)
    sizes_W = torch.zeros(ranks.num_ranks, dtype=torch.int64, device=ranks.device)
    own_1 = torch.tensor([len(data)], device=ranks.device)
    dist.all_gather_into_tensor(sizes_W, own_1, group=ranks.group)
    sizes = sizes_W.tolist()
    padded_S = torch.zeros(max(sizes), dtype=torch.uint8, device=ranks.device)
    padded_S[: len(data)] = data
    gathered = padded_S.new_empty(ranks.num_ranks * max(sizes))
    dist.all_gather_into_tensor(gathered, padded_S, group=ranks.group)
    texts = [part[:size].cpu() for part, size in zip(gathered.split(max(sizes)), sizes, strict=True)]
    return [parse_json(text.numpy().tobytes()) for text in texts]
