"""Tokens per second of training, and TFLOPS: the paper's models against a dense one of equal multiply-adds.

    python -m benchmarks.training_speed

Whole steps (forward, backward, clipping, Adam) of two recipes on the same random text, in turn in one
process. Before anything is timed, the loss must be the one of an untrained model. rate: the second recipe's
time per step over the first's. TFLOPS are the paper's metric: backward counts twice the forward pass, a
multiply-add is two operations, and the softmax is counted, over the words that it is trained on.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks import RESULTS
from sparsegate.benchmarking.measuring import circumstances, markdown, median_ratio, seconds, store
from sparsegate.data import Batch
from sparsegate.models import MixtureLM
from sparsegate.models.translation import Translation
from sparsegate.recipes.cluster import arithmetic_flops
from sparsegate.recipes.registry import recipe
from sparsegate.training.config import RunConfig
from sparsegate.training.making import make_state
from sparsegate.training.overrides import replace_by_path
from sparsegate.training.step import Gradient, apply_gradient, compute_gradient
from sparsegate.training.tasks.language import language_parts

MODELS = ("moe-4", "moe-32", "moe-256", "moe-256-h", "moe-1-wide", "moe-1-deep", "lstm-2048-512")


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    rows = []
    for name in args.models:
        steps = {n: stepper(config_of(n, args), args) for n in (name, args.baseline)}
        times = seconds(steps, repeats=args.repeats)
        tokens = args.batch_size * args.num_steps
        rows.append(
            {
                "model": name,
                "tokens/s": tokens / statistics.median(times[name]),
                "TFLOPS": tflops(name, tokens / statistics.median(times[name]), args),
                "baseline": args.baseline,
                "baseline tokens/s": tokens / statistics.median(times[args.baseline]),
                "rate": median_ratio(times[args.baseline], times[name]),
            }
        )
    print(markdown(rows))
    print(store(RESULTS / f"{args.name}.json", {**circumstances(), "rows": rows}))


def config_of(name: str, args: argparse.Namespace) -> RunConfig:
    """The recipe, its experts updated in backward if that is asked for."""
    config = recipe(name)
    if args.in_backward and isinstance(config.model, MixtureLM):
        return replace_by_path(config, {"optim.experts": "factored", "optim.in_backward": True})
    return config


def tflops(name: str, tokens_per_second: float, args: argparse.Namespace) -> float:
    """By the paper's metric."""
    model = recipe(name).model
    assert not isinstance(model, Translation), name
    return arithmetic_flops(replace(model, vocab_size=args.vocabulary)) * tokens_per_second / 1e12


def random_text(args: argparse.Namespace) -> Batch:
    """A batch of the sizes that are given, of words that are equally frequent."""
    text_BS = torch.randint(args.vocabulary, (args.batch_size, args.num_steps + 1))
    return Batch(
        input_BS=text_BS[:, :-1],
        target_BS=text_BS[:, 1:],
        mask_BS=torch.ones_like(text_BS[:, 1:], dtype=torch.bool),
        carries_state=False,
        index=0,
    )


def stepper(config: RunConfig, args: argparse.Namespace) -> Callable[[], None]:
    """A function that trains a fresh model of the configuration for one step."""
    config = replace(config, model=replace(config.model, vocab_size=args.vocabulary))
    state = make_state(config)
    batch = random_text(args)
    parts = list(language_parts(state.model, batch, {}, config))
    untrained = compute_gradient(state.model, parts, config)
    off = untrained.nll - math.log(args.vocabulary)
    # A sampled softmax tells the target from fewer words.
    assert off < 1.5, untrained.nll
    assert off > -1.5 or config.model.sampled_words, untrained.nll

    def update(gradient: Gradient) -> None:
        apply_gradient(state.model, state.optimizers, gradient, learning_rate=1e-3, clip_norm=1.0)
        state.model.after_step(gradient.sums)

    update(untrained)
    return lambda: update(
        compute_gradient(state.model, list(language_parts(state.model, batch, {}, config)), config)
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--baseline", default="4xlstm-512")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--num-steps", type=int, default=64)
    parser.add_argument("--in-backward", action="store_true", help="experts: factored, updated in backward")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="training_speed", help="of the file of results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
