"""Forward and backward of the layer against a dense feed-forward layer of the same active multiply-adds.

    python -m benchmarks.layer

Width 512, hidden 1024, k = 4, 4,096 tokens, float32, all gradients, noisy gate and both balance losses
included. The dense layer has the same 4,096 rows and hidden 4 * 1024, in the same process. The output is
first compared with the formula of eq. 1; then the two are timed in turn. rate: the dense layer's time over
the mixture's.
"""

import argparse
import statistics
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measuring import markdown, median_ratio, seconds, store
from sparsegate import MoE, importance_loss, load_loss


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    x_TD = torch.randn(args.tokens, args.width, requires_grad=True)
    rows = [measure(x_TD, num_experts, args) for num_experts in args.experts]
    print(markdown(rows))
    print(store("layer", rows))


def measure(x_TD: Tensor, num_experts: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    moe = MoE.noisy_topk(width=args.width, hidden=args.hidden, num_experts=num_experts, k=args.k)
    check(moe, x_TD)
    dense = nn.Sequential(
        nn.Linear(args.width, args.k * args.hidden, bias=False),
        nn.ReLU(),
        nn.Linear(args.k * args.hidden, args.width, bias=False),
    )
    grad_TD = torch.randn(args.tokens, args.width)

    def sparse_step() -> None:
        moe.zero_grad(set_to_none=True)
        y_TD, routing = moe(x_TD)
        torch.autograd.backward([y_TD, importance_loss(routing) + load_loss(routing)], [grad_TD, None])

    def dense_step() -> None:
        dense.zero_grad(set_to_none=True)
        dense(x_TD).backward(grad_TD)

    times = seconds({"sparse": sparse_step, "dense": dense_step}, repeats=args.repeats)
    return {
        "experts": num_experts,
        "tokens per expert": args.tokens * args.k // num_experts,
        "mixture ms": 1e3 * statistics.median(times["sparse"]),
        "dense ms": 1e3 * statistics.median(times["dense"]),
        "rate": median_ratio(times["dense"], times["sparse"]),
    }


@torch.no_grad()
def check(moe: MoE, x_TD: Tensor) -> None:
    """The output must be the sum of eq. 1, expert by expert, for the first tokens."""
    y_TD, routing = moe(x_TD)
    k = routing.pairs_per_token
    for token in range(8):
        pairs = slice(token * k, (token + 1) * k)
        expected_D = sum(
            weight * ((x_TD[token] @ moe.experts.w_in[expert]).relu() @ moe.experts.w_out[expert])
            for weight, expert in zip(routing.weight_N[pairs], routing.expert_N[pairs], strict=True)
        )
        torch.testing.assert_close(y_TD[token], expected_D, rtol=1e-4, atol=1e-4)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 32, 256, 1024])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
