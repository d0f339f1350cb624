"""Hierarchical gates over tens of thousands of experts, forward and backward, on the CPU.

    python -m benchmarks.hierarchical_gate

Real gates of width 512 with noisy top-k gating at both levels, k = 2, both balance losses; no experts. Each
row is measured in a process of its own. "activations" is how much the peak of the process's memory grew
beyond weights and gradients; "T x E" is what one float32 tensor of tokens times experts would take. The
routing is checked before it is timed: weights of a token sum to 1, pairs are distinct, every group is known.
"""

import argparse
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from benchmarks.measuring import markdown, store
from sparsegate import Hierarchical, Routing, importance_loss, load_loss


def main() -> None:
    args = _arguments()
    rows = []
    for num_experts, num_groups in ((65_536, 256), (131_072, 256)):
        for num_tokens in args.tokens:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                rows.append(process.submit(measure, num_experts, num_groups, num_tokens, args).result())
    print(markdown(rows))
    torch.set_num_threads(args.threads)
    print(store("hierarchical_gate", rows))


def measure(num_experts: int, num_groups: int, num_tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    gate = Hierarchical.noisy_topk(
        width=args.width, num_experts=num_experts, num_groups=num_groups, k_primary=2, k_secondary=2
    )
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter, std=args.width**-0.5)
        parameter.grad = torch.zeros_like(parameter)
    x_TD = torch.randn(num_tokens, args.width, requires_grad=True)
    cotangent_N = torch.randn(num_tokens * gate.pairs_per_token)
    held_bytes = _peak_bytes()
    times = []
    for _ in range(args.repeats + 1):
        gate.zero_grad(set_to_none=True)
        started = time.perf_counter()
        routing = gate(x_TD)
        loss = (routing.weight_N * cotangent_N).sum() + importance_loss(routing) + load_loss(routing)
        loss.backward()
        times.append(time.perf_counter() - started)
        check(routing, num_tokens)
    return {
        "experts": num_experts,
        "groups": num_groups,
        "tokens": num_tokens,
        "seconds": statistics.median(times[1:]),
        "activations MB": (_peak_bytes() - held_bytes) / 1e6,
        "T x E MB": 4 * num_tokens * num_experts / 1e6,
    }


def check(routing: Routing, num_tokens: int) -> None:
    """What every routing of this gate must be."""
    weight_TK = routing.weight_N.reshape(num_tokens, -1)
    torch.testing.assert_close(weight_TK.sum(dim=1), torch.ones(num_tokens))
    expert_TK = routing.expert_N.reshape(num_tokens, -1).sort(dim=1).values
    assert (expert_TK.diff(dim=1) > 0).all()
    assert (expert_TK < routing.num_experts).all()


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16_384])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
