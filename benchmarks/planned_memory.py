"""The peak memory that `sparsegate plan` predicts beside the one that training has, in a process for each.

    python -m benchmarks.planned_memory

Measured is the most that a process holds while it trains, beyond what it held before it made the model (so
without the program itself), with an allocator that gives back what is freed. Linux tells it. Mixtures hold
some 50 to 100 MB more after a few steps, in products that oneDNN has compiled for each number of rows; that
is not predicted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from sparsegate.benchmarking.measuring import circumstances, markdown, store
from sparsegate.cli.plan import method_of
from sparsegate.data import prepare
from sparsegate.models.memory import training_memory
from sparsegate.recipes.registry import recipe
from sparsegate.training.config import RunConfig
from sparsegate.training.loop import train
from sparsegate.training.overrides import replace_by_path

STEPS = 4
CASES: dict[str, tuple[str, dict[str, object], int]] = {
    # name: recipe, changes, words of the vocabulary
    "1,024 experts, factored": ("small-moe-1024-h", {"optim.experts": "factored"}, 4000),
    "1,024 experts, Adam": ("small-moe-1024-h", {}, 4000),
    "256 experts, flat, 4,096 tokens": ("small-moe-256", {"batches.batch_size": 128}, 4000),
    "60,000 words": ("small-moe-32", {}, 60_000),
    "60,000 words, adaptive softmax": ("small-moe-32", {"model.softmax_cutoffs": (4000, 20_000)}, 60_000),
    "LSTMs, 60,000 words, sampled softmax": ("small-4xlstm", {"model.softmax_samples": 2048}, 60_000),
    "LSTMs, 60,000 words, sampled softmax, tables by rows": (
        "small-4xlstm",
        {"model.softmax_samples": 2048, "optim.tables": "rows"},
        60_000,
    ),
    "4,096 experts, bfloat16, in backward": (
        "small-moe-4096-h",
        {"optim.experts": "factored", "optim.in_backward": True, "model.expert_dtype": "bfloat16"},
        4000,
    ),
    "LSTMs, 8,192 tokens": ("small-4xlstm", {"batches.batch_size": 256}, 4000),
    "LSTMs, 8,192 tokens in 4 parts": (
        "small-4xlstm",
        {"batches.batch_size": 256, "training.micro_batches": 4},
        4000,
    ),
}
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps({"measured": measure(args.one[0], Path(args.one[1]))}))
        return
    rows = [row(name) for name in args.cases]
    print(markdown(rows))
    if args.out:
        store(args.out, circumstances() | {"rows": rows})


def row(name: str) -> dict[str, object]:
    """Predicted and measured, in a process of its own, in megabytes."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.planned_memory", "--one", name, folder],
            capture_output=True,
            text=True,
            # What is freed goes back to the system at once: the allocator's waste is not predicted.
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
        )
    if done.returncode:
        raise SystemExit(done.stderr)
    measured = json.loads(done.stdout.splitlines()[-1])["measured"]
    predicted = predict(name)
    return {
        "case": name,
        "predicted (MB)": predicted / 1e6,
        "measured (MB)": measured / 1e6,
        "predicted / measured": predicted / measured,
    }


def config_of(name: str) -> RunConfig:
    recipe_name, changes, _ = CASES[name]
    steps = {"training.steps": STEPS, "training.evaluate_every": STEPS, "training.checkpoint_every": STEPS}
    return replace_by_path(recipe(recipe_name), changes | steps)


def predict(name: str) -> int:
    config, vocabulary = config_of(name), CASES[name][2]
    model = replace(config.model, vocab_size=vocabulary)
    return training_memory(model, method_of(config)).peak


def measure(name: str, folder: Path) -> int:
    """Bytes, in the present process."""
    torch.set_num_threads(1)
    data = folder / "data"
    text(folder / "text", CASES[name][2])
    prepare(
        output=data,
        train=[folder / "text"],
        valid=[folder / "valid"],
        vocabulary="words",
        vocabulary_size=CASES[name][2],
    )
    config = replace(config_of(name), data=str(data))
    tiny = {"model.num_experts": 8} if config.model.kind == "mixture" else {}
    if config.name.endswith("-h"):
        tiny["model.gate.num_groups"] = 4
    tiny |= {"batches.batch_size": 4, "training.micro_batches": 1}
    train(replace_by_path(config, tiny), folder=folder / "first")  # loads what is loaded once
    before = bytes_of("VmRSS")
    RESET.write_text("5")  # the peak begins anew
    train(config, folder=folder / "run")
    return bytes_of("VmHWM") - before


def text(path: Path, num_words: int) -> None:
    """Every word of a vocabulary of that size twice, so that it comes out at this size; and a little more."""
    words = [f"w{number}" for number in range(num_words - 2)]
    lines = [" ".join(words[start : start + 20]) for start in range(0, len(words), 20)] * 2
    lines *= max(1, 300_000 // (2 * num_words))
    path.write_text("\n".join(lines))
    path.with_name("valid").write_text("\n".join(lines[:50]))


def bytes_of(field: str) -> int:
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


if __name__ == "__main__":
    main()
