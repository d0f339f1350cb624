"""The Triton kernels on a CUDA device: checked, tuned and timed, forward and backward, beside peers.

    python -m benchmarks.gpu

bfloat16, experts from a fixed routing with balanced counts, and the whole layer with noisy top-k and its
losses. All kernels are compiled first, on all processors. Who computes wrongly is not timed. roof: the rate
of a dense product of 8,192 cubed in the same call; GB/s: of the experts' weights, read once in forward. Peak
memory is beyond what was there before the step, weight gradients included. Rows are stored one by one, and
rows that are stored are not measured again.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import RESULTS
from benchmarks.gpu_contestants import CONTESTANTS, Built, Case, Operands, operands, ours, plain
from sparsegate.benchmarking.measuring import circumstances, markdown
from sparsegate.moe.kernels import reference
from sparsegate.moe.kernels.grouped import grouped_product, grouped_products
from sparsegate.moe.kernels.noisy_choice import equations
from sparsegate.training.storage import write_json_atomically

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
        Case(32768, 2048, 512, 512, 10, "swiglu"),
    ],
    "swiglu": _sonic("swiglu"),
    "relu": _sonic("relu"),
    "few": [
        *(Case(tokens, 2048, 768, 128, 8, "swiglu") for tokens in (1, 8, 64, 256)),
        *(Case(tokens, 512, 1024, 4096, 4, "relu") for tokens in (1, 8, 64, 256)),
    ],
}


CHECKED = Case(1000, 200, 136, 12, 3, "relu")
CAPTURED = Case(4096, 512, 1024, 256, 4, "relu")
MOST_WRONG = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
LAYERS = ("triton, whole layer", "triton, hierarchical layer")


def check(case: Case, device: str, dtype: torch.dtype) -> float:
    """Greatest error of our values and gradients against float32 products, relative to the greatest value."""
    given = operands(case, device, dtype)
    wide = Operands(*(t.detach().float().requires_grad_() for t in given.leaves()), given.routing)
    built, expected_TD = ours(case, given), plain(wide, case.activation)
    (y_TD,) = built.call()
    grad_TD = torch.randn_like(expected_TD)
    found = y_TD, *torch.autograd.grad(y_TD, built.leaves, grad_TD.to(y_TD.dtype))
    expected = expected_TD, *torch.autograd.grad(expected_TD, wide.leaves(), grad_TD)
    return max(map(_error, found, expected))


def wrongness(built: Built, given: Operands, activation: str) -> float:
    """Greatest error of a contestant's output and gradient of x against plain products in the same dtype."""
    if not built.comparable:
        return 0.0
    y_TD, *_ = built.call()
    expected_TD = plain(given, activation)
    grad_TD = torch.randn_like(expected_TD)
    (found,) = torch.autograd.grad(y_TD, built.leaves[:1], grad_TD)
    (expected,) = torch.autograd.grad(expected_TD, [given.x_TD], grad_TD)
    return max(_error(y_TD, expected_TD), _error(found, expected))


def _error(found: Tensor, expected: Tensor) -> float:
    difference, greatest = (found.detach() - expected.detach()).abs().max(), expected.detach().abs().max()
    return float(difference / greatest)


def step(built: Built, grad_TD: Tensor) -> None:
    """Forward and backward with all gradients."""
    outputs = built.call()
    grads = [grad_TD, *(torch.ones_like(loss) for loss in outputs[1:])]
    torch.autograd.grad(outputs, built.leaves, grads)


def check_groups(device: str, dtype: torch.dtype) -> float:
    """As `check`, of the grouped products of hierarchical gates and their gradients."""
    end_E = torch.tensor([300, 300, 470, 900], device=device)  # of 1,000 rows
    leaves = [torch.randn(1000, 200, device=device, dtype=dtype).requires_grad_()]
    leaves += [torch.randn(4, 200, width, device=device, dtype=dtype).requires_grad_() for width in (48, 33)]
    wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
    found = grouped_products(*leaves, end_E, kernel="triton")
    alone = grouped_product(*leaves[:2], end_E, kernel="triton")
    expected = torch.cat([reference.grouped_product(wide[0], weight, end_E) for weight in wide[1:]], dim=1)
    grad = torch.randn_like(expected)
    founds = found, *torch.autograd.grad(found, leaves, grad.to(dtype))
    founds += torch.autograd.grad(alone, leaves[1], grad[:, :48].to(dtype))
    expecteds = expected, *torch.autograd.grad(expected, wide, grad)
    return max(map(_error, founds, (*expecteds, expecteds[2])))


def check_choice(device: str) -> float:
    """As `check`, of the noisy choice and its gradients, against the equations for what was chosen."""
    from sparsegate.moe.kernels.triton.noisy_choice import _forward

    logits_NS = torch.randn(300, 400, device=device).requires_grad_()
    noise_NB = torch.randn(300, 200, device=device).requires_grad_()
    *values, expert_NK1 = _forward(logits_NS, noise_NB, None, 1, 4, 0.01)
    choice = equations(
        logits_NS, noise_NB, None, num_groups=1, k=4, noise_epsilon=0.01, chosen_NK1=expert_NK1
    )
    results = []
    for each in (values, [choice.weight_NK, choice.load_AB, *choice.logit_sums]):
        grads = torch.autograd.grad([value.square().sum() for value in each], [logits_NS, noise_NB])
        results.append([*each, *grads])
    found, expected = results
    noisy_NB = logits_NS[:, :200] + noise_NB * (torch.nn.functional.softplus(logits_NS[:, 200:]) + 0.01)
    found.append(noisy_NB.gather(1, expert_NK1))
    expected.append(noisy_NB.topk(5, dim=1).values)
    return max(map(_error, found, expected))


def captured(name: str, case: Case) -> bool:
    """Whether a step of a whole layer goes into a CUDA graph: nothing in it waits for the device."""
    given = operands(case, "cuda", torch.bfloat16)
    built, grad_TD = CONTESTANTS[name](case, given), torch.randn_like(given.x_TD)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step(built, grad_TD)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step(built, grad_TD)
    except RuntimeError as error:
        print(f"CUDA graph: {str(error).splitlines()[0]}", file=sys.stderr)
        return False
    graph.replay()
    torch.cuda.synchronize()
    return True


def measure(case: Case, name: str, roof: float) -> dict[str, Any]:
    """One row of the table, in tera-operations per second."""
    from triton.testing import do_bench

    given = operands(case, "cuda", torch.bfloat16)
    built, grad_TD = CONTESTANTS[name](case, given), torch.randn_like(given.x_TD)
    # The plain products of thousands of experts take too long; there the small cases of `check` must do.
    error = wrongness(built, given, case.activation) if case.experts <= 512 else None
    if error is not None and error > 5e-2:
        raise ValueError(f"wrong by {error:.1e} of the greatest value")
    step(built, grad_TD)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(built, grad_TD)
    peak = torch.cuda.max_memory_allocated() - before
    with torch.no_grad():
        forward_ms = do_bench(built.call, warmup=10, rep=60)
    both_ms = do_bench(lambda: step(built, grad_TD), warmup=10, rep=60)
    weights = sum(t.numel() * t.element_size() for t in (given.w_in_EDS, given.w_out_EHD))
    return {
        **case._asdict(),
        "kernel": name,
        "error": error,
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


def new_rows(family: str, done: list[dict[str, Any]], seconds: float) -> Iterator[dict[str, Any]]:
    """The rows of a family that are not done, ours first; none after its time is over."""
    known = {tuple(row[f] for f in (*Case._fields, "kernel")) for row in done}
    roof, started = dense_rate(), time.monotonic()
    for name, case in itertools.product(CONTESTANTS, FAMILIES[family]):
        if (*case, name) in known or time.monotonic() - started > seconds:
            continue
        try:
            yield measure(case, name, roof)
        except Exception as error:  # of foreign code, which can raise anything
            yield {**case._asdict(), "kernel": name, "not there": _reason(error)}
        torch.cuda.empty_cache()


def compile_ahead(cases: list[Case]) -> None:
    """Fill Triton's cache on all processors at once, or most of the time would be spent waiting for one."""
    from benchmarks.gpu_code import side_by_side  # imports triton, which comes with torch where a device is

    major, minor = torch.cuda.get_device_capability()
    started = time.monotonic()
    try:
        kernels = sum(side_by_side(partial(_num_compiled, capability=10 * major + minor), cases))
    except Exception as error:  # then each is compiled when it is first needed
        print(f"benchmarks.gpu: nothing is compiled ahead: {_reason(error)}", file=sys.stderr)
    else:
        print(f"{kernels} kernels of {len(cases)} cases compiled in {time.monotonic() - started:.0f} s")


def _num_compiled(case: Case, capability: int) -> int:
    from benchmarks.gpu_code import compiled_case

    return len(compiled_case(case, capability))


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def require_right_kernels() -> None:
    """SystemExit where a kernel computes on this device what it should not."""
    checks = [
        (
            f"{activation} experts",
            dtype,
            partial(check, CHECKED._replace(activation=activation), "cuda", dtype),
        )
        for activation in ("relu", "swiglu")
        for dtype in MOST_WRONG
    ]
    checks += [("grouped products", dtype, partial(check_groups, "cuda", dtype)) for dtype in MOST_WRONG]
    checks += [("noisy choice", torch.float32, partial(check_choice, "cuda"))]
    for name, dtype, run in checks:
        error = run()
        print(f"{name}, {dtype}: error {error:.1e} of the greatest value")
        if not error <= MOST_WRONG[dtype]:
            raise SystemExit(f"benchmarks.gpu: {name} in {dtype} are wrong on this device")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--seconds", type=float, default=80, help="for each family")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device here", file=sys.stderr)
        return 2
    of_families = [case for family in args.families for case in FAMILIES[family]]
    compile_ahead([CHECKED, CHECKED._replace(activation="swiglu"), CAPTURED, *of_families])
    require_right_kernels()
    graph = {name: captured(name, CAPTURED) for name in LAYERS}
    for name, is_captured in graph.items():
        print(f"a step of {name} {'is' if is_captured else 'cannot be'} captured in a CUDA graph")
    for family in args.families:
        path = RESULTS / f"gpu_{family}.json"
        stored = json.loads(path.read_text())["rows"] if path.exists() else []
        rows = [row for row in stored if "not there" not in row]
        for row in new_rows(family, list(rows), args.seconds):
            rows.append({**row, "commit": circumstances()["commit"]})
            device = {"device": torch.cuda.get_device_name(), "CUDA graph": graph}
            write_json_atomically(path, {**circumstances(), **device, "rows": rows})
            print(markdown([row]).splitlines()[-1], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
