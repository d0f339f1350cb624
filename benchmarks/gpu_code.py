"""What becomes of the Triton kernels, compiled for devices that need not be here.

    python -m benchmarks.gpu_code

The kernels of one step of experts in bfloat16, forward and backward, in every tile shape that is tried, and
of their gate's choice; what two cases share stands there once. *shared*: KiB of a program; *registers* of a
thread; *local*: bytes that it keeps in memory because they do not suffice. *together*: programs that a
multiprocessor holds at once, 0 if not even one. *code*: instructions; *loop*: those of the innermost loop
that multiplies; *product*: by which instruction, *products*: how many of them; *copies*: loads that go on
beside them; *spills*: loads and stores of what the registers do not hold.
"""

import argparse
import multiprocessing
import re
import subprocess
import tempfile
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from hashlib import sha256
from typing import Any, NamedTuple, TypeVar

import torch
import triton

from benchmarks import RESULTS
from benchmarks.gpu_contestants import Case, ours, untouched
from sparsegate.benchmarking.measuring import circumstances, markdown, store
from sparsegate.moe.kernels.choice import MOST_CHOSEN_FROM
from sparsegate.moe.kernels.triton.ahead import Compiled, compiled_for
from sparsegate.moe.kernels.triton.noisy_choice import noisy_choice

CASES = [
    Case(65536, 512, 1024, 256, 4, "relu"),
    Case(65536, 512, 1024, 4096, 4, "relu"),
    Case(32768, 2048, 768, 128, 8, "swiglu"),
    Case(64, 2048, 768, 128, 8, "swiglu"),
]
_THREADS = 32  # of a warp
_REGISTERS = 65_536  # of a multiprocessor
_MOST_THREADS = 2048
# KiB of a multiprocessor's shared memory by capability; of these each program takes one for itself.
_SHARED = {80: 164, 86: 100, 89: 100, 90: 228}
_PRODUCTS = ("HGMMA", "HMMA", "FFMA")  # of the tensor cores by four warps together, by each; without them


_Found = TypeVar("_Found")


class Code(NamedTuple):
    """The machine code of a kernel, looked at: columns of the table."""

    registers: int
    local: int
    together: int
    code: int
    loop: int
    product: str
    products: int
    copies: int
    spills: int


def main() -> None:
    args = _arguments()
    rows: dict[str, dict[str, Any]] = {}
    for capability in args.capabilities:
        for found in side_by_side(partial(_rows, capability=capability), CASES):
            rows |= found
    table = list(rows.values())
    print(markdown(table))
    print(store(RESULTS / "gpu_code.json", {**circumstances(), "triton": triton.__version__, "rows": table}))


def side_by_side(look: Callable[[Case], _Found], cases: Sequence[Case]) -> Iterator[_Found]:
    """What `look` finds for each case, in processes that leave what they compile in Triton's cache."""
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(look, cases)


def compiled_case(case: Case, capability: int, dtype: torch.dtype = torch.bfloat16) -> list[Compiled]:
    """The kernels of forward and backward, those of forward alone where they are others, and the gate's."""

    def call() -> None:
        if case.k < case.experts <= MOST_CHOSEN_FROM:
            choose(case)
        built = ours(case, untouched(case, dtype))
        with torch.no_grad():
            built.call()
        (y_TD,) = built.call()
        torch.autograd.grad(y_TD, built.leaves, torch.empty_like(y_TD))

    return compiled_for(capability, call)


def choose(case: Case) -> None:
    """A noisy gate's choice and its gradient, of numbers that were never written."""
    logits_NS = torch.empty(case.tokens, 2 * case.experts).requires_grad_()
    noise_NB = torch.empty(case.tokens, case.experts)
    choice = noisy_choice(logits_NS, noise_NB, None, num_groups=1, k=case.k, noise_epsilon=0.0)
    values = [choice.weight_NK, choice.load_AB, *choice.logit_sums]
    torch.autograd.grad(values, logits_NS, [torch.empty_like(value) for value in values])


def code_of(compiled: Compiled, capability: int) -> Code:
    """What the assembler's tools tell of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.assembly["cubin"])
        file.flush()
        usage = _said([triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name])
        listing = _said([triton.knobs.nvidia.nvdisasm.path, "-c", file.name]).splitlines()
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    registers, local = int(found[1]), int(found[2])
    loop = innermost_loop(listing) if "INNER" in compiled.constants else Counter()
    product = next((name for name in _PRODUCTS if loop[name]), "")
    return Code(
        registers=registers,
        local=local,
        together=_together(registers, compiled, capability),
        code=len(_named(listing)),
        loop=loop.total(),
        product=product,
        products=loop[product],
        copies=loop["LDGSTS"],
        spills=loop["LDL"] + loop["STL"],
    )


def innermost_loop(listing: Sequence[str]) -> Counter[str]:
    """Instructions by name of the shortest loop that multiplies; none if there is none."""
    instructions = _named(listing)
    labels = [re.match(r"(\.L_x_\d+):", line.strip()) for line in listing]
    # Where each label stands among the instructions.
    places = {
        label[1]: bisect_left(instructions, (number, "", "")) for number, label in enumerate(labels) if label
    }
    loops = []
    for end, (_, name, operands) in enumerate(instructions):
        target = re.search(r"`\((\.L_x_\d+)\)", operands) if name == "BRA" else None
        if target and places[target[1]] <= end:
            loops.append(Counter(name for _, name, _ in instructions[places[target[1]] : end + 1]))
    multiplying = [loop for loop in loops if any(loop[name] for name in _PRODUCTS)]
    return min(multiplying, key=Counter.total, default=Counter())


def _named(listing: Sequence[str]) -> list[tuple[int, str, str]]:
    """Line, name and operands of each instruction."""
    found = (re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\w+)(.*)", line) for line in listing)
    return [(number, match[1], match[2]) for number, match in enumerate(found) if match]


def _said(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _together(registers: int, compiled: Compiled, capability: int) -> int:
    threads = _THREADS * compiled.warps
    by_registers = _REGISTERS // (-(-registers // 8) * 8 * threads)
    by_shared = _SHARED[capability] // (compiled.shared / 1024 + 1)
    return int(min(by_registers, by_shared, _MOST_THREADS // threads))


def _rows(case: Case, capability: int) -> dict[str, dict[str, Any]]:
    """Rows of the table by the hash of the machine code, so that what two cases share is told once."""
    return {
        sha256(compiled.assembly["cubin"]).hexdigest(): _row(case, capability, compiled)
        for compiled in compiled_case(case, capability)
    }


def _row(case: Case, capability: int, compiled: Compiled) -> dict[str, Any]:
    of = compiled.constants
    return {
        "capability": capability / 10,
        "case": " ".join(map(str, case)),
        "kernel": compiled.name.strip("_").removesuffix("_kernel"),
        "tile": "x".join(str(of[name]) for name in ("ROWS", "TOKENS", "COLUMNS", "INNER") if name in of),
        "warps": compiled.warps,
        "stages": compiled.stages,
        "shared": compiled.shared / 1024,
        **code_of(compiled, capability)._asdict(),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--capabilities", type=int, nargs="+", choices=_SHARED, default=[80, 90], help="times ten"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
