"""A small Transformer whose feed-forward layers are mixtures of experts, on a task that needs both halves.

    python examples/transformer_block.py

Each sequence is random tokens, then a query; the answer is a permutation of the token that the query points
at. Attention has to fetch the token, the feed-forward layer to permute it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsegate import MoE, Routing, importance_loss, load_loss

NUM_TOKENS, LENGTH, WIDTH = 16, 8, 32


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
    """Two blocks; the routings of all layers come out beside the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(NUM_TOKENS + LENGTH, WIDTH)
        self.positions = nn.Parameter(0.1 * torch.randn(LENGTH + 1, WIDTH))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.output = nn.Linear(WIDTH, NUM_TOKENS)

    def forward(self, token_BS: Tensor) -> tuple[Tensor, list[Routing]]:
        x_BSD = self.tokens(token_BS) + self.positions
        routings = []
        for block in self.blocks:
            x_BSD, routing = block(x_BSD)
            routings.append(routing)
        return self.output(x_BSD[:, -1]), routings


def batch(permutation: Tensor, size: int) -> tuple[Tensor, Tensor]:
    token_BS = torch.randint(NUM_TOKENS, (size, LENGTH))
    query_B = torch.randint(LENGTH, (size, 1))
    answer_B = permutation[token_BS.gather(1, query_B)].squeeze(1)
    return torch.cat([token_BS, NUM_TOKENS + query_B], dim=1), answer_B


def main() -> None:
    torch.manual_seed(0)
    permutation, model = torch.randperm(NUM_TOKENS), Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(301):
        token_BS, answer_B = batch(permutation, 64)
        logits, routings = model(token_BS)
        task = F.cross_entropy(logits, answer_B)
        balance = sum(importance_loss(r) + load_loss(r) for r in routings)  # per layer, then added
        optimizer.zero_grad()
        (task + 0.01 * balance).backward()
        optimizer.step()
        if step % 100 == 0:
            counts = [routing.sums.count_E.tolist() for routing in routings]
            print(f"step {step}: loss {task.item():.3f}, tokens of each expert by layer {counts}")

    with torch.no_grad():
        token_BS, answer_B = batch(permutation, 2048)
        correct = model.eval()(token_BS)[0].argmax(dim=1) == answer_B
    print(f"accuracy {correct.float().mean():.3f}, by chance {1 / NUM_TOKENS:.3f}")


if __name__ == "__main__":
    main()
