"""What a token costs with 32 and with 4,096 experts, where the batch is large enough for both.

    python -m benchmarks.many_experts

Width 256, hidden 512, k = 4, 131,072 tokens, float32, forward and backward with all gradients. experts: from
a fixed Routing whose experts are drawn evenly. whole layer: with its gate and both losses, flat and noisy
top-4 for 32 experts, 64 groups of 64 with two of each for 4,096. The output is first compared with the
formula of eq. 1; then all four are timed in turn. growth: the time with 4,096 experts over that with 32.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import RESULTS
from sparsegate import FeedForward, Hierarchical, MoE, NoisyTopK, importance_loss, load_loss
from sparsegate.benchmarking.measuring import circumstances, markdown, median_ratio, seconds, store
from sparsegate.moe.routing import Routing

WIDTH, HIDDEN, K = 256, 512, 4
FEW, MANY = 32, 4096


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    x_TD = torch.randn(args.tokens, WIDTH, requires_grad=True)
    grad_TD = torch.randn(args.tokens, WIDTH)
    gates = {
        FEW: NoisyTopK(width=WIDTH, num_experts=FEW, k=K),
        MANY: Hierarchical.noisy_topk(
            width=WIDTH, num_experts=MANY, num_groups=64, k_primary=2, k_secondary=2
        ),
    }
    steps: dict[str, Callable[[], None]] = {}
    for num_experts, gate in gates.items():
        moe = MoE(gate=gate, experts=FeedForward(width=WIDTH, hidden=HIDDEN, num_experts=num_experts))
        check(moe, x_TD[:4096])
        steps[f"experts {num_experts}"] = experts_step(moe, x_TD, grad_TD)
        steps[f"whole layer {num_experts}"] = layer_step(moe, x_TD, grad_TD)
    times = seconds(steps, repeats=args.repeats)
    rows = [
        {
            "what": what,
            "seconds, 32 experts": statistics.median(times[f"{what} {FEW}"]),
            "seconds, 4,096 experts": statistics.median(times[f"{what} {MANY}"]),
            "growth": median_ratio(times[f"{what} {MANY}"], times[f"{what} {FEW}"]),
        }
        for what in ("experts", "whole layer")
    ]
    print(markdown(rows))
    print(store(RESULTS / "many_experts.json", {**circumstances(), "tokens": args.tokens, "rows": rows}))


def experts_step(moe: MoE, x_TD: Tensor, grad_TD: Tensor) -> Callable[[], None]:
    """Forward and backward of the experts; every token draws its experts evenly, no expert twice."""
    num_tokens, num_experts = len(x_TD), moe.experts.num_experts
    # One draw in each of K equal shares of the experts: no expert twice, and no T x E tensor.
    share_K = torch.arange(K) * (num_experts // K)
    expert_TK = torch.randint(num_experts // K, (num_tokens, K)) + share_K
    with torch.no_grad():
        drawn = moe.gate(x_TD[:1])
    token_N = torch.arange(num_tokens).repeat_interleave(K)
    routing = replace(
        drawn,
        token_N=token_N,
        expert_N=expert_TK.flatten(),
        pairs_T=torch.full((num_tokens,), K),
    )
    weight_N = torch.rand(num_tokens * K, requires_grad=True)

    def step() -> None:
        moe.zero_grad(set_to_none=True)
        x_TD.grad = weight_N.grad = None
        moe.experts(x_TD, replace(routing, weight_N=weight_N)).backward(grad_TD)

    return step


def layer_step(moe: MoE, x_TD: Tensor, grad_TD: Tensor) -> Callable[[], None]:
    def step() -> None:
        moe.zero_grad(set_to_none=True)
        x_TD.grad = None
        y_TD, routing = moe(x_TD)
        torch.autograd.backward([y_TD, importance_loss(routing) + load_loss(routing)], [grad_TD, None])

    return step


@torch.no_grad()
def check(moe: MoE, x_TD: Tensor) -> None:
    """The output must be the sum of eq. 1, pair by pair, for the first tokens."""
    y_TD, routing = moe(x_TD)
    for token in range(4):
        expected_D = torch.zeros(WIDTH)
        for pair in _pairs(routing, token):
            expert = routing.expert_N[pair]
            hidden_H = (x_TD[token] @ moe.experts.w_in[expert]).relu()
            expected_D += routing.weight_N[pair] * (hidden_H @ moe.experts.w_out[expert])
        torch.testing.assert_close(y_TD[token], expected_D, rtol=1e-4, atol=1e-4)


def _pairs(routing: Routing, token: int) -> list[int]:
    is_used_N = (routing.token_N == token) & (routing.expert_N < routing.num_experts)
    return is_used_N.nonzero().flatten().tolist()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
