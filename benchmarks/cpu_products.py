"""What the CPU's products cost: which library, how many threads for each, and memory used before or fresh.

    python -m benchmarks.cpu_products

Products of the rows of an expert with its matrix, float32, as many experts as make 16,384 rows, 256 at most.
Each way is first compared with float64; then all are timed in turn, experts one after the other with all
threads, or side by side with one thread each. The second table is of smaller matrices, side by side: oneDNN's
time over that of torch.mm. The last one is the time to write one gigabyte.
"""

import argparse
import mmap
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import RESULTS
from sparsegate.benchmarking.measuring import circumstances, markdown, median_ratio, seconds, store
from sparsegate.moe.kernels.workers import in_parallel


def onednn(rows_ND: Tensor, weight_DH: Tensor) -> Tensor:
    """As `moe/kernels/products.py` reaches it."""
    return torch.ops.mkldnn._linear_pointwise(rows_ND, weight_DH.t(), None, "none", [], "")


WAYS = {"torch.mm": torch.mm, "oneDNN": onednn}
SMALLER = ((64, 128), (128, 256), (256, 512), (512, 1024))
FEW_ROWS = (4, 16, 32, 64, 128)


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    products = [measure(num_rows, args) for num_rows in args.rows]
    smaller = [measure_smaller(num_rows, args.repeats) for num_rows in FEW_ROWS]
    writes = measure_writes(args.repeats)
    print(markdown(products), markdown(smaller), markdown(writes), sep="\n\n")
    found = {**circumstances(), "products": products, "smaller": smaller, "writes": writes}
    print(store(RESULTS / "cpu_products.json", found))


def measure(num_rows: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table, in GFLOP/s."""
    rows, weights = operands(num_rows, args.width, args.hidden)
    steps: dict[str, Callable[[], None]] = {}
    for name, multiply in WAYS.items():
        steps[f"{name}, all threads"] = one_after_the_other(multiply, rows, weights)
        steps[f"{name}, side by side"] = side_by_side(multiply, rows, weights)
    times = seconds(steps, repeats=args.repeats)
    gflop = 2e-9 * len(rows) * num_rows * args.width * args.hidden
    return {
        "rows of an expert": num_rows,
        **{name: gflop / statistics.median(own) for name, own in times.items()},
    }


def measure_smaller(num_rows: int, repeats: int) -> dict[str, Any]:
    """One row of the table of smaller matrices."""
    found: dict[str, Any] = {"rows of an expert": num_rows}
    for width, hidden in SMALLER:
        rows, weights = operands(num_rows, width, hidden)
        steps = {name: side_by_side(multiply, rows, weights) for name, multiply in WAYS.items()}
        times = seconds(steps, repeats=repeats)
        found[f"{width} x {hidden:,}"] = median_ratio(times["oneDNN"], times["torch.mm"])
    return found


def operands(num_rows: int, width: int, hidden: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Rows and a matrix for each expert, with which both ways have been seen to be right."""
    num_experts = max(4, min(16_384 // num_rows, 256))
    rows = torch.randn(num_experts, num_rows, width).unbind()
    weights = torch.randn(num_experts, width, hidden).unbind()
    for multiply in WAYS.values():
        exact = rows[0].double() @ weights[0].double()
        torch.testing.assert_close(multiply(rows[0], weights[0]).double(), exact, rtol=1e-4, atol=1e-3)
    return rows, weights


def one_after_the_other(
    multiply: Callable[[Tensor, Tensor], Tensor], rows: Sequence[Tensor], weights: Sequence[Tensor]
) -> Callable[[], None]:
    def step() -> None:
        for rows_ND, weight_DH in zip(rows, weights, strict=True):
            multiply(rows_ND, weight_DH)

    return step


def side_by_side(
    multiply: Callable[[Tensor, Tensor], Tensor], rows: Sequence[Tensor], weights: Sequence[Tensor]
) -> Callable[[], None]:
    return lambda: in_parallel(lambda expert: multiply(rows[expert], weights[expert]), range(len(rows)))


def measure_writes(repeats: int) -> list[dict[str, Any]]:
    """Seconds to fill a gigabyte that was written before, and one that the system has just handed out."""
    num_bytes = 1 << 30
    used = torch.ones(num_bytes // 4)

    def fresh() -> None:
        block = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        torch.frombuffer(memoryview(block), dtype=torch.float32).fill_(1)

    times = seconds({"used before": lambda: used.fill_(1), "fresh": fresh}, repeats=repeats)
    return [{"memory": name, "seconds for 1 GiB": statistics.median(own)} for name, own in times.items()]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 4, 8, 16, 64, 256, 512, 4096])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
