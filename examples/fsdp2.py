"""Mixtures of experts in a PyTorch model of one's own, on several processes, the rest under FSDP2.

    torchrun --nproc-per-node 2 examples/fsdp2.py

Each rank holds its share of the experts, FSDP2 shards everything else, and the gradients are those of one
process on the joined batch: a rank's loss is divided by the number of all ranks' sequences, the balance
losses are of sums over all ranks, and gradients are added up.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sparsegate import MoE, Routing, importance_loss, load_loss
from sparsegate.parallel.distribute import (
    expert_parameters,
    gradient_norm,
    shard_the_rest,
    spread_experts,
)
from sparsegate.parallel.gradients import GradientSums
from sparsegate.parallel.sums import sum_over_ranks

NUM_TOKENS, LENGTH, WIDTH, BATCH = 16, 8, 32, 256


class Block(nn.Module):
    """Attention and a mixture of experts, each behind a normalisation and beside a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, num_heads=4, batch_first=True)
        self.moe = MoE.noisy_topk(width=WIDTH, hidden=64, num_experts=8, k=2)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Routing]:
        x = self.norm1(x_BSD)
        x_BSD = x_BSD + self.attention(x, x, x, need_weights=False)[0]
        y_BSD, routing = self.moe(self.norm2(x_BSD))
        return x_BSD + y_BSD, routing


class Model(nn.Module):
    """Sorts: each token of a sequence is answered by the token of its place in sorted order."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(NUM_TOKENS, WIDTH)
        self.positions = nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.output = nn.Linear(WIDTH, NUM_TOKENS)

    def forward(self, token_BS: Tensor) -> tuple[Tensor, list[Routing]]:
        x_BSD, routings = self.tokens(token_BS) + self.positions, []
        for block in self.blocks:
            x_BSD, routing = block(x_BSD)
            routings.append(routing)
        return self.output(x_BSD), routings


def main() -> None:
    dist.init_process_group()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("expert",))
    torch.manual_seed(0)  # the same weights on all ranks
    model = Model().to(device)
    spread_experts(model, mesh)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, ignored_params=set(expert_parameters(model)))
    shard_the_rest(model, mesh)
    sums = GradientSums(model, mesh, dist.new_group())
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, foreach=False)
    torch.manual_seed(1 + dist.get_rank())  # other sequences on each rank
    for step in range(120):
        token_BS = torch.randint(NUM_TOKENS, (BATCH // dist.get_world_size(), LENGTH), device=device)
        target_BS = token_BS.sort(dim=1).values
        logit_BSV, routings = model(token_BS)
        task = F.cross_entropy(logit_BSV.flatten(0, 1), target_BS.flatten(), reduction="sum")
        total = sum_over_ranks([routing.sums for routing in routings])
        balance = sum(0.1 * (importance_loss(each) + load_loss(each)) for each in total)
        optimizer.zero_grad()
        with sums.overlap():
            (task / (BATCH * LENGTH) + balance).backward()
        norm = gradient_norm(model, mesh)
        optimizer.step()
        if step % 40 == 39 and dist.get_rank() == 0:
            accuracy = (logit_BSV.argmax(dim=-1) == target_BS).float().mean()
            print(f"step {step + 1}: accuracy {accuracy:.2f}, gradient norm {norm:.2f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
