"""Experts of few rows on the CPU: many experts in one call against a product for each, side by side.

    python -m benchmarks.few_rows

The forward pass of ReLU experts that have so many rows each, which come from memory: a buffer larger than the
caches is written before each call. The two ways (`moe/kernels/row_by_row.py`, `expert_by_expert.py`) must
agree, and are timed in turn. *ratio* is the time of expert by expert over that of row by row; *chosen* is
whether the layer goes row by row there.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import RESULTS
from sparsegate.benchmarking.measuring import circumstances, markdown, median_ratio, seconds, store
from sparsegate.benchmarking.shape import DTYPES
from sparsegate.moe.dispatch import Plan
from sparsegate.moe.kernels import expert_by_expert, row_by_row

SIZES = [(128, 256), (256, 512), (512, 1024), (1024, 4096)]
LARGER_THAN_CACHES = 1 << 28  # bytes


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = [
        measure(width, hidden, num_experts, num_rows, args)
        for width, hidden in SIZES
        for num_experts in args.experts
        if num_experts * width * hidden <= args.most_numbers
        for num_rows in args.rows
    ]
    print(markdown(rows))
    name = "few_rows" if args.dtype == "float32" else f"few_rows_{args.dtype}"
    print(store(RESULTS / f"{name}.json", {**circumstances(), "rows": rows}))


def measure(
    width: int, hidden: int, num_experts: int, num_rows: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One row of the table: experts in use, and rows of each."""
    dtype = DTYPES[args.dtype]
    x_TD = torch.randn(num_experts * num_rows, width, dtype=dtype)
    w_in_EDH = torch.randn(num_experts, width, hidden, dtype=dtype) / width**0.5
    w_out_EHD = torch.randn(num_experts, hidden, width, dtype=dtype) / hidden**0.5
    forward = partial(
        expert_by_expert.forward,
        x_TD,
        w_in_EDH,
        w_out_EHD,
        torch.ones(len(x_TD)),
        _plan(num_experts, num_rows),
        activation="relu",
        dtype=dtype,
        keep=False,
    )
    ways = {
        "expert by expert": _way(forward, is_row_by_row=False),
        "row by row": _way(forward, is_row_by_row=True),
    }
    by_expert_TD, by_row_TD = (way().float() for way in ways.values())
    torch.testing.assert_close(by_row_TD, by_expert_TD, rtol=0, atol=1e-4 if dtype.itemsize == 4 else 0.1)
    buffer = torch.ones(LARGER_THAN_CACHES // 4)
    times = seconds(ways, repeats=args.repeats, before=lambda: buffer.add_(1.0))
    weights_gb = num_experts * 2 * width * hidden * dtype.itemsize / 1e9
    count_E = torch.full((num_experts,), num_rows)
    is_chosen = row_by_row.suits(count_E, (w_in_EDH, w_out_EHD), dtype)
    return {
        "width": width,
        "hidden": hidden,
        "experts": num_experts,
        "rows of each": num_rows,
        **{f"{name} (GB/s)": weights_gb / statistics.median(own) for name, own in times.items()},
        "ratio": median_ratio(times["expert by expert"], times["row by row"]),
        "chosen": "yes" if is_chosen else "no",
    }


def _way(forward: Callable[[], tuple[Tensor, Tensor]], *, is_row_by_row: bool) -> Callable[[], Tensor]:
    def way() -> Tensor:
        with patch.object(row_by_row, "suits", return_value=is_row_by_row):
            return forward()[0]

    return way


def _plan(num_experts: int, num_rows: int) -> Plan:
    """Tokens in the order of their experts, one for each."""
    token_N = torch.arange(num_experts * num_rows)
    return Plan(
        order_N=token_N,
        row_N=token_N,
        token_N=token_N,
        end_E=torch.arange(1, num_experts + 1) * num_rows,
        pairs_T=torch.ones_like(token_N),
        pairs_per_token=1,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 32, 256], help="in use")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8, 12, 16])
    parser.add_argument("--most-numbers", type=int, default=1 << 27, help="in all first matrices")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
