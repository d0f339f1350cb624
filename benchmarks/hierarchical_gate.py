"""Hierarchical gates over tens of thousands of experts, forward and backward, on the CPU.

    python -m benchmarks.hierarchical_gate

Real gates of width 512, k = 2 at both levels, which are noisy top-k or strictly balanced gating, with their
losses; no experts. Each row is measured in a process of its own. "activations" is how much the peak of the
process's memory grew beyond weights and gradients; "T x E" is what one float32 tensor of tokens times experts
would take. Every routing is checked: its pairs are distinct, weights of a token that has experts sum to 1 at
most, and to 1 in noisy top-k gating.
"""

import argparse
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from typing import Any

import torch

from benchmarks import RESULTS
from sparsegate import (
    Balanced,
    BalancedGroups,
    Hierarchical,
    Routing,
    importance_loss,
    load_loss,
    threshold_loss,
)
from sparsegate.benchmarking.measuring import circumstances, markdown, store


def main() -> None:
    args = _arguments()
    rows = []
    for name, num_experts, num_tokens in product(GATES, (65_536, 131_072), args.tokens):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            rows.append(process.submit(measure, name, num_experts, num_tokens, args).result())
    print(markdown(rows))
    torch.set_num_threads(args.threads)
    print(store(RESULTS / "hierarchical_gate.json", {**circumstances(), "rows": rows}))


def noisy_topk(width: int, num_experts: int) -> Hierarchical:
    return Hierarchical.noisy_topk(
        width=width, num_experts=num_experts, num_groups=NUM_GROUPS, k_primary=2, k_secondary=2
    )


def balanced(width: int, num_experts: int) -> Hierarchical:
    return Hierarchical(
        primary=Balanced(width=width, num_experts=NUM_GROUPS, k=2),
        secondary=BalancedGroups(
            width=width, num_groups=NUM_GROUPS, group_size=num_experts // NUM_GROUPS, k=2
        ),
    )


NUM_GROUPS = 256
GATES = {"noisy top-k": noisy_topk, "strictly balanced": balanced}


def measure(name: str, num_experts: int, num_tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    gate = GATES[name](args.width, num_experts)
    for parameter_name, parameter in gate.named_parameters():
        if not parameter_name.endswith("log_threshold"):
            torch.nn.init.normal_(parameter, std=args.width**-0.5)
        parameter.grad = torch.zeros_like(parameter)
    x_TD = torch.randn(num_tokens, args.width, requires_grad=True)
    held_bytes = _peak_bytes()
    times = []
    for _ in range(args.repeats + 1):
        gate.zero_grad(set_to_none=True)
        started = time.perf_counter()
        routing = gate(x_TD)
        losses = importance_loss(routing) + load_loss(routing) + threshold_loss(routing)
        (routing.weight_N.square().sum() + losses).backward()
        times.append(time.perf_counter() - started)
        check(routing, exact=name == "noisy top-k")
    return {
        "gate": name,
        "experts": num_experts,
        "groups": NUM_GROUPS,
        "tokens": num_tokens,
        "seconds": statistics.median(times[1:]),
        "activations MB": (_peak_bytes() - held_bytes) / 1e6,
        "T x E MB": 4 * num_tokens * num_experts / 1e6,
    }


def check(routing: Routing, *, exact: bool) -> None:
    """What every routing must be; exact: every token has experts, whose weights sum to 1."""
    used_N = routing.expert_N < routing.num_experts
    pair_N = (routing.token_N * routing.num_experts + routing.expert_N)[used_N]
    assert len(pair_N.unique()) == len(pair_N) == routing.sums.count_E.sum() > 0
    total_T = torch.zeros(len(routing.pairs_T)).index_add(0, routing.token_N, routing.weight_N.detach())
    assert (total_T < 1 + 1e-5).all()
    if exact:
        torch.testing.assert_close(total_T, torch.ones_like(total_T))


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
