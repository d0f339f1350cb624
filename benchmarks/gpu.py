"""The Triton kernels on a CUDA device: checked, tuned and timed, forward and backward, beside `F.grouped_mm`.

    python -m benchmarks.gpu

bfloat16, experts from a fixed routing with balanced counts. roof: the rate of a dense product of 8,192 cubed
in the same call; GB/s: of the experts' weights, read once in forward. Peak memory is beyond what was there
before the step, weight gradients included. Rows are stored one by one, and rows that are stored are not
measured again.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import RESULTS
from sparsegate.benchmarking.measuring import circumstances, markdown
from sparsegate.moe.dispatch import Plan, combine, dispatch, plan_rows
from sparsegate.moe.kernels import reference
from sparsegate.moe.routing import LogitSums, Routing


class Case(NamedTuple):
    """Tokens, width, hidden width, experts, experts of a token, activation."""

    tokens: int
    width: int
    hidden: int
    experts: int
    k: int
    activation: str

    def ops(self) -> int:
        """Of the forward pass, two for each multiply-add."""
        matrices = 3 if self.activation == "swiglu" else 2
        return 2 * matrices * self.tokens * self.k * self.width * self.hidden


_SONIC = [
    (40960, 768, [(256, 128, 8), (512, 64, 4), (1024, 32, 2)]),
    (24576, 1536, [(256, 128, 8), (512, 64, 4), (1024, 32, 2)]),
    (32768, 4096, [(256, 256, 16), (512, 128, 8), (1024, 64, 4)]),
    (32768, 4096, [(512, 256, 16), (1024, 128, 8), (2048, 64, 4)]),
]


def _sonic(activation: str) -> list[Case]:
    return [Case(t, d, h, e, k, activation) for t, d, shapes in _SONIC for h, e, k in shapes]


FAMILIES: dict[str, list[Case]] = {
    "paper": [Case(65536, 512, 1024, e, 4, "relu") for e in (4, 32, 256, 1024, 4096, 16384)],
    "models": [
        Case(32768, 2048, 1024, 64, 8, "swiglu"),
        Case(8192, 2048, 768, 128, 8, "swiglu"),
        Case(32768, 2048, 768, 128, 8, "swiglu"),
    ],
    "swiglu": _sonic("swiglu"),
    "relu": _sonic("relu"),
}


def operands(case: Case, device: str, dtype: torch.dtype) -> tuple[list[Tensor], Plan]:
    """x, w_in, w_out, gate weights that need gradients, and the plan of a random routing."""
    columns = case.hidden * (2 if case.activation == "swiglu" else 1)
    score_TE = torch.rand(case.tokens, min(case.experts, 4096), device=device)
    expert_TK = score_TE.topk(case.k).indices * (case.experts // score_TE.shape[1])
    weight_TK = torch.rand(case.tokens, case.k, device=device)
    expert_TK += torch.randint(case.experts // score_TE.shape[1], expert_TK.shape, device=device)
    routing = Routing.of_token_choice(
        logit_sums=LogitSums(weight_TK.new_zeros(1, case.experts), weight_TK.new_zeros(())),
        expert_TK=expert_TK,
        weight_TK=weight_TK,
        mask_T=None,
        load_E=weight_TK.new_zeros(case.experts),
    )
    sizes = (case.experts, case.width, columns), (case.experts, case.hidden, case.width)
    made = [torch.randn(case.tokens, case.width, device=device, dtype=dtype)]
    made += [torch.randn(size, device=device, dtype=dtype).mul_(size[1] ** -0.5) for size in sizes]
    return [t.requires_grad_() for t in (*made, routing.weight_N.detach())], plan_rows(routing)


def composed(product: Any, given: list[Tensor], plan: Plan, activation: str) -> Tensor:
    """The layer with any grouped product."""
    x_TD, w_in_EDS, w_out_EHD, weight_N = given
    pre_NS = product(dispatch(x_TD, plan), w_in_EDS, plan.end_E)
    gate_NH, *up_NH = pre_NS.chunk(2, dim=-1) if activation == "swiglu" else (pre_NS,)
    hidden_NH = F.silu(gate_NH) * up_NH[0] if up_NH else gate_NH.relu()
    return combine(product(hidden_NH, w_out_EHD, plan.end_E), plan, weight_N).to(x_TD.dtype)


def grouped_mm(rows_ND: Tensor, weight_EDH: Tensor, end_E: Tensor) -> Tensor:
    return F.grouped_mm(rows_ND, weight_EDH, offs=end_E.to(torch.int32))


def ours(given: list[Tensor], plan: Plan, activation: str) -> Tensor:
    from sparsegate.moe.kernels.triton.feed_forward import feed_forward

    return feed_forward(*given, plan, activation)


def check(case: Case, device: str, dtype: torch.dtype) -> float:
    """Greatest error of values and gradients against float32 products, relative to the greatest value."""
    given, plan = operands(case, device, dtype)
    wide = [t.detach().float().requires_grad_() for t in given]
    y_TD, expected_TD = (
        ours(given, plan, case.activation),
        composed(reference.grouped_product, wide, plan, case.activation),
    )
    grad_TD = torch.randn_like(expected_TD)
    found = y_TD, *torch.autograd.grad(y_TD, given, grad_TD.to(y_TD.dtype))
    expected = expected_TD, *torch.autograd.grad(expected_TD, wide, grad_TD)
    return max(
        float((a.detach().float() - b.detach()).abs().max() / b.detach().abs().max())
        for a, b in zip(found, expected, strict=True)
    )


def measure(case: Case, name: str, call: Any, roof: float) -> dict[str, Any]:
    """One row of the table, in tera-operations per second."""
    from triton.testing import do_bench

    given, plan = operands(case, "cuda", torch.bfloat16)
    grad_TD = torch.randn_like(given[0])

    def step() -> None:
        torch.autograd.grad(call(given, plan, case.activation), given, grad_TD)

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    with torch.no_grad():
        forward_ms = do_bench(lambda: call(given, plan, case.activation), warmup=10, rep=60)
    both_ms = do_bench(step, warmup=10, rep=60)
    weights = sum(t.numel() * t.element_size() for t in given[1:3])
    return {
        **case._asdict(),
        "kernel": name,
        "forward ms": forward_ms,
        "forward Tops/s": case.ops() / forward_ms / 1e9,
        "forward share": case.ops() / forward_ms / 1e9 / roof,
        "both ms": both_ms,
        "both Tops/s": 3 * case.ops() / both_ms / 1e9,
        "both share": 3 * case.ops() / both_ms / 1e9 / roof,
        "weights GB/s": weights / forward_ms / 1e6,
        "peak MB": peak / 1e6,
    }


def dense_rate() -> float:
    from triton.testing import do_bench

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / do_bench(lambda: a @ b) / 1e9


CALLS: dict[str, Any] = {
    "triton": ours,
    "F.grouped_mm": lambda given, plan, activation: composed(grouped_mm, given, plan, activation),
}


def rows_of(family: str, path: Path, seconds: float) -> Iterator[dict[str, Any]]:
    """The rows of a family, stored ones first; none after its time is over."""
    done = json.loads(path.read_text())["rows"] if path.exists() else []
    yield from done
    known = {tuple(row[f] for f in (*Case._fields, "kernel")) for row in done}
    roof, started = dense_rate(), time.monotonic()
    for case, (name, call) in itertools.product(FAMILIES[family], CALLS.items()):
        if (*case, name) in known or time.monotonic() - started > seconds:
            continue
        try:
            yield measure(case, name, call, roof)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            yield {**case._asdict(), "kernel": name, "not there": str(error).splitlines()[0][:120]}
        torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--seconds", type=float, default=130, help="for each family")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device here", file=sys.stderr)
        return 2
    for activation, dtype in itertools.product(("relu", "swiglu"), (torch.float32, torch.bfloat16)):
        error = check(Case(1000, 200, 136, 12, 3, activation), "cuda", dtype)
        print(f"{activation}, {dtype}: error {error:.1e} of the greatest value")
        if error > (1e-4 if dtype == torch.float32 else 2e-2):
            raise SystemExit("benchmarks.gpu: the kernels are wrong on this device")
    for family in args.families:
        path, rows = RESULTS / f"gpu_{family}.json", []
        for row in rows_of(family, path, args.seconds):
            rows.append(row)
            found = {**circumstances(), "device": torch.cuda.get_device_name(), "rows": rows}
            path.write_text(json.dumps(found, indent=2) + "\n")
            print(markdown([row]).splitlines()[-1], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
