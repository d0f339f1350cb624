"""A step of training the output layer at the paper's 793,471 words: full, fused, sampled and adaptive.

    python -m benchmarks.softmax

The loss of some tokens, its gradients, and Adam's update of the layer's own weights, without the model before
it. Each way has a process of its own, and its loss is checked before it is timed: by formula, in float64. all
logits: the full softmax with its [tokens, words] logits, as it was and as it still is for few of them. some
at a time: what trains now instead. sampled: of 8,192 words, with the optimizer for rows. adaptive: with
clusters from the 20,000th and the 200,000th word.

Peak: of what the process holds beyond what it held before the layer was made, its weights, gradients and
optimizer included; Linux tells it. For that the allocator gives back what is freed, which takes time: with
--times it is left as it is, and the peak is not to be believed. Words are drawn log-uniformly, as they are
frequent.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import RESULTS
from sparsegate.benchmarking.measuring import circumstances, markdown, store
from sparsegate.models import cross_entropy
from sparsegate.models.softmax import AdaptiveSoftmax, OutputSoftmax, Softmax, draw_log_uniform, log_chance
from sparsegate.optim.rows import RowAdam

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
CUTOFFS = (20_000, 200_000)
WAYS = ("full, all logits", "full, some at a time", "sampled", "adaptive")
# To the allocator: what is freed goes back to the system at once, and is not counted as held.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
# Of the words, so that their float64 weights are never there at once either.
_CHECKED_AT_ONCE = 1 << 15


def main() -> None:
    args = _arguments()
    if args.one:
        print(json.dumps(measure(args.one, args)))
        return
    rows = []
    for name in args.ways:
        rows.append(row(name, args))
        print(rows[-1], file=sys.stderr, flush=True)
    print(markdown(rows))
    sizes = {name: getattr(args, name) for name in ("tokens", "words", "width", "samples", "repeats")}
    how = {"threads": args.threads, "times": args.times, **sizes}
    print(store(args.out, {**circumstances(), **how, "rows": rows}))


def row(name: str, args: argparse.Namespace) -> dict[str, object]:
    """Measured in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.softmax", "--one", name, *sys.argv[1:]],
        capture_output=True,
        text=True,
        env={**os.environ, **({} if args.times else GIVES_BACK)},
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return {"softmax": name, **json.loads(done.stdout.splitlines()[-1])}


def measure(name: str, args: argparse.Namespace) -> dict[str, object]:
    """In the present process."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if name == "full, all logits":
        cross_entropy.MAX_LOGITS = args.tokens * args.words
    target_T = draw_log_uniform(args.tokens, args.words, device=torch.device("cpu"))
    target_T = target_T[torch.randperm(args.tokens)]
    hidden_TD = torch.randn(args.tokens, args.width, requires_grad=True)
    before = _bytes("VmRSS")
    RESET.write_text("5")  # the peak begins anew
    softmax = make(name, args)
    optimizers = make_optimizers(softmax)
    check(softmax, hidden_TD, target_T)
    times = []
    for _ in range(args.repeats + 1):
        started = time.perf_counter()
        softmax.zero_grad(set_to_none=True)
        hidden_TD.grad = None
        softmax.nll(hidden_TD, target_T).mean().backward()
        computed = time.perf_counter()
        for optimizer in optimizers:
            optimizer.step()
        times.append((computed - started, time.perf_counter() - started))
    loss, step = (statistics.median(column) for column in zip(*times[1:], strict=True))
    return {
        "loss and gradients (s)": loss,
        "with update (s)": step,
        "tokens/s": args.tokens / step,
        "peak (GB)": (_bytes("VmHWM") - before) / 1e9,
    }


def make(name: str, args: argparse.Namespace) -> Softmax:
    if name == "adaptive":
        return AdaptiveSoftmax(vocab_size=args.words, width=args.width, cutoffs=CUTOFFS)
    samples = args.samples if name == "sampled" else 0
    return OutputSoftmax(vocab_size=args.words, width=args.width, num_samples=samples)


def make_optimizers(softmax: Softmax) -> list[torch.optim.Optimizer]:
    """As in training with `optim.tables rows`."""
    tables = softmax.use_sparse_gradients()
    others = [p for p in softmax.parameters() if all(p is not table for table in tables)]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam(others, fused=True)]
    return [*optimizers, RowAdam(tables)] if tables else optimizers


@torch.no_grad()
def check(softmax: Softmax, hidden_TD: Tensor, target_T: Tensor) -> None:
    """Refuse a loss that is not what its formula says of some tokens."""
    num_tokens = 8
    hidden_TD, target_T = hidden_TD[:num_tokens], target_T[:num_tokens]
    if isinstance(softmax, AdaptiveSoftmax):
        expected_T = -softmax.clusters(hidden_TD, target_T).output.double()
    else:
        assert isinstance(softmax, OutputSoftmax)
        expected_T = (sampled if softmax.num_samples else full)(softmax, hidden_TD.double(), target_T)
    torch.manual_seed(1)
    torch.testing.assert_close(
        softmax.nll(hidden_TD, target_T).double(), expected_T, rtol=1e-5, atol=1e-4, msg="another loss"
    )


def full(softmax: OutputSoftmax, hidden_TD: Tensor, target_T: Tensor) -> Tensor:
    logits_TV = torch.cat(
        [
            hidden_TD @ weight_BD.double().T + bias_B.double()
            for weight_BD, bias_B in zip(
                softmax.weight.split(_CHECKED_AT_ONCE), softmax.bias.split(_CHECKED_AT_ONCE), strict=True
            )
        ],
        dim=1,
    )
    return logits_TV.logsumexp(dim=1) - logits_TV.gather(1, target_T[:, None])[:, 0]


def sampled(softmax: OutputSoftmax, hidden_TD: Tensor, target_T: Tensor) -> Tensor:
    """Of the candidates that seed 1 draws."""
    torch.manual_seed(1)
    sample_S = softmax.draw()
    losses = []
    for hidden_D, target in zip(hidden_TD, target_T, strict=True):
        others_S = sample_S.unique()
        word_S = torch.cat([target[None], others_S[others_S != target]])
        chance_S = log_chance(word_S, num_samples=len(sample_S), vocab_size=softmax.vocab_size)
        logits_S = softmax.weight[word_S].double() @ hidden_D + softmax.bias[word_S].double() - chance_S
        losses.append(logits_S.logsumexp(dim=0) - logits_S[0])
    return torch.stack(losses)


def _bytes(field: str) -> int:
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--words", type=int, default=793_471)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--samples", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--times", action="store_true", help="an allocator as in training")
    parser.add_argument("--out", type=Path, default=RESULTS / "softmax.json")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
