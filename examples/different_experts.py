"""Experts that differ: some are networks, one hands its input on, and the gate learns which to ask.

    python examples/different_experts.py

Half of the points are to be left as they are, the other half bent; each expert suits one of these tasks.
"""

import torch
from torch import nn

from sparsegate import ModuleExperts, MoE, NoisyTopK, importance_loss

WIDTH = 8


def two_layers(hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, hidden), nn.ReLU(), nn.Linear(hidden, WIDTH))


def batch(num_points: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points and their targets: sin(2x) where the first coordinate is positive, x itself elsewhere."""
    x = torch.randn(num_points, WIDTH)
    return x, torch.where(x[:, :1] > 0, torch.sin(2 * x), x)


def main() -> None:
    torch.manual_seed(0)
    experts = [nn.Identity(), two_layers(16), two_layers(64), two_layers(64)]
    moe = MoE(gate=NoisyTopK(width=WIDTH, num_experts=4, k=2), experts=ModuleExperts(experts))
    optimizer = torch.optim.Adam(moe.parameters(), lr=1e-2)
    for _ in range(400):
        x, target = batch(256)
        y, routing = moe(x)
        loss = (y - target).square().mean() + 0.01 * importance_loss(routing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    x, target = batch(4096)
    with torch.no_grad():
        y, routing = moe.eval()(x)
    error, of_identity = (y - target).square().mean(), (x - target).square().mean()
    print(f"squared error {error:.4f}, of the identity {of_identity:.4f}")
    bent_N = x[routing.token_N, 0] > 0
    for name, chosen_N in (("left as they are", ~bent_N), ("bent", bent_N)):
        weight_E = torch.zeros(4).index_add(0, routing.expert_N[chosen_N], routing.weight_N[chosen_N])
        shares = [round(weight, 2) for weight in (weight_E / weight_E.sum()).tolist()]
        print(f"experts of the points that are {name}: {shares}")


if __name__ == "__main__":
    main()
