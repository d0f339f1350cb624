"""`sparsegate doctor`: what is here, and which kernel would compute the experts."""

import json
import sys
from argparse import Namespace
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from ..benchmarking.measuring import circumstances
from ..moe.kernels.choice import KERNELS, Setting, chosen_kernel
from .verb import Parser, Verb

EXAMPLE = """
sparsegate doctor --json
sparsegate doctor --experts 4096 --width 512 --hidden 1024
"""
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--experts", type=int, default=32, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--width", type=int, default=512, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=1024, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: Namespace) -> int:
    for field in ("experts", "width", "hidden"):
        if getattr(args, field) < 1:
            raise ValueError(f"--{field} ({getattr(args, field)}) must be at least 1")
    report = {"machine": _machine(), "kernels": _kernels(args)}
    if args.json:
        print(json.dumps(report, allow_nan=False))
    else:
        _print(report)
    return 0


def _machine() -> dict[str, Any]:
    """What figures depend on, and the devices that torch sees."""
    known = circumstances()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        **{
            name: known[name]
            for name in ("version", "torch", "python", "processor", "vector_units", "threads")
        },
        "gpus": gpus,
    }


def _kernels(args: Namespace) -> list[dict[str, Any]]:
    """One row for each device and dtype: the kernel, and why each of the others was passed over."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows = []
    for device in devices:
        for name, dtype in _DTYPES.items():
            setting = Setting(device, dtype, args.experts, args.width, args.hidden)
            kernel = chosen_kernel(None, setting)
            others = {
                other.name: other.unsuited(setting) for other in KERNELS.values() if other.name != kernel
            }
            rows.append({"device": device, "dtype": name, "kernel": kernel, "others": others})
    return rows


def _print(report: dict[str, Any]) -> None:
    console = Console(file=sys.stdout, highlight=False)
    for name, value in report["machine"].items():
        shown = ", ".join(value) or "none" if name == "gpus" else value
        console.print(f"[dim]{name.replace('_', ' '):>12}[/]  {escape(str(shown))}", soft_wrap=True)
    for row in report["kernels"]:
        kernel = KERNELS[row["kernel"]]
        console.print(
            f"\n{row['device']} {row['dtype']}: [bold]{kernel.name}[/], {kernel.what}", soft_wrap=True
        )
        for other, reason in row["others"].items():
            shown = reason or f"can be used by name, kernel={other!r}"
            console.print(f"[dim]  {other:<10}  {escape(shown)}[/]", soft_wrap=True)


VERB = Verb(example=EXAMPLE, add_arguments=add_arguments, run=run)
