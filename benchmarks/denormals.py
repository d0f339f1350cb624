"""What numbers below the smallest normal one cost on the CPU, and what it saves to take them for 0.

    python -m benchmarks.denormals
    python -m benchmarks.denormals --run RUN --data DATA

A product of the gate's shape with a share of such numbers in one factor; the gate itself, forward and
backward with its losses, for logits that are far apart; and the gradient of a batch for the model of a
trained run.
*kept* is a process as torch starts it, in which the layer's own threads alone flush them, and *flushed* one
that has called `torch.set_flush_denormal(True)` before anything else, as `sparsegate train` does. Each row is
measured in processes of its own: threads have the mode of the one that started them.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks import RESULTS
from sparsegate import NoisyTopK, importance_loss, load_loss
from sparsegate.benchmarking.measuring import circumstances, markdown, seconds, store
from sparsegate.data import Batch, Dataset
from sparsegate.recipes.load import load, require_language
from sparsegate.training.step import Gradient, compute_gradient
from sparsegate.training.tasks.language import language_parts

Step = Callable[[], object]
TOKENS, WIDTH, EXPERTS = 8192, 512, 256
SHARES = (0.0, 0.001, 0.01, 0.02)


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    steps: dict[str, Callable[[], Step]] = {
        **{f"product, {share:.1%} of a factor": partial(product, share) for share in SHARES},
        "gate": gate,
        **{str(run): partial(model, run, args.data) for run in args.run},
    }
    rows = []
    for name, make in steps.items():
        kept, flushed = (_in_a_process(make, flush, args) for flush in (False, True))
        rows.append(
            {"what": name, "kept (ms)": 1e3 * kept, "flushed (ms)": 1e3 * flushed, "ratio": kept / flushed}
        )
    print(markdown(rows))
    print(store(RESULTS / "denormals.json", {**circumstances(), "rows": rows}))


def _in_a_process(make: Callable[[], Step], flush: bool, args: argparse.Namespace) -> float:
    """Seconds of a step."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_measure, make, flush, args).result()


def _measure(make: Callable[[], Step], flush: bool, args: argparse.Namespace) -> float:
    torch.set_flush_denormal(flush)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return statistics.median(seconds({"": make()}, repeats=args.repeats)[""])


def product(share: float) -> Step:
    """[D, T] times [T, 2 E]: the gradient of the gate's weights."""
    x_TD, grad_TE = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, 2 * EXPERTS)
    is_tiny_TE = torch.rand_like(grad_TE) < share
    expected_DE = x_TD.T @ grad_TE.masked_fill(is_tiny_TE, 0.0)
    grad_TE[is_tiny_TE] = torch.finfo(torch.float32).tiny / 10
    torch.testing.assert_close(x_TD.T @ grad_TE, expected_DE)
    return lambda: x_TD.T @ grad_TE


def gate() -> Step:
    """With weights as large as those of a layer, so that logits and thresholds are far apart."""
    module = NoisyTopK(width=WIDTH, num_experts=EXPERTS, k=4)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=WIDTH**-0.5)
    x_TD = torch.randn(TOKENS, WIDTH, requires_grad=True)

    def step() -> None:
        module.zero_grad(set_to_none=True)
        routing = module(x_TD)
        (routing.weight_N.square().sum() + importance_loss(routing) + load_loss(routing)).backward()

    return step


def model(folder: Path, data: Path | None) -> Step:
    """The gradient of the first words of the validation split."""
    trained = require_language(load(folder))
    split = Dataset.open(data or Path(trained.config.data)).splits["valid"]
    text_BS = torch.from_numpy(split.token_N[: 32 * 65].astype("int64")).reshape(32, 65)
    batch = Batch(
        input_BS=text_BS[:, :-1],
        target_BS=text_BS[:, 1:],
        mask_BS=torch.ones_like(text_BS[:, 1:], dtype=torch.bool),
        carries_state=False,
        index=0,
    )
    network = trained.model.train()

    def step() -> Gradient:
        parts = list(language_parts(network, batch, {}, trained.config))
        return compute_gradient(network, parts, trained.config)

    assert math.isfinite(step().nll)
    return step


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, nargs="+", default=[], help="trained language models")
    parser.add_argument("--data", type=Path, help="another dataset than the run's")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
