"""How a product is launched: tile shapes worth trying, and the fastest of them for each kind of call."""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

_log = logging.getLogger(__name__)
_Found = TypeVar("_Found")

_REGISTERS = 65_536  # of a multiprocessor, from Volta to Hopper


class Shape(NamedTuple):
    """A way to compute tiles of `rows` x `columns`, `inner` at a time.

    warps, stages: of a program, and of its pipeline of loads. programs: how many share a multiprocessor, so
    that one multiplies while another stores; `registers` keeps them small enough, their number must be exact,
    or the tiles that run together would not be neighbours.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    programs: int

    @property
    def registers(self) -> int:
        """Of a thread, at most: 65,536 for all programs, handed out by eights, 255 to each."""
        return min(_REGISTERS // (32 * self.warps * self.programs) // 8 * 8, 255)


# Hopper multiplies 64 rows by up to 256 columns at a time: 128 x 256 reads the fewest bytes per product, and
# 128 x 128 leaves room for a second program. Low tiles wait for weights: for them loads in flight count.
_HALF_PRECISION = (
    Shape(128, 256, 64, warps=8, stages=3, programs=1),
    Shape(128, 256, 64, warps=8, stages=4, programs=1),
    Shape(128, 128, 64, warps=8, stages=3, programs=2),
    Shape(128, 128, 32, warps=4, stages=4, programs=2),
    Shape(64, 128, 64, warps=4, stages=4, programs=2),
    Shape(64, 128, 64, warps=4, stages=3, programs=3),
    Shape(64, 256, 32, warps=4, stages=4, programs=2),
    Shape(32, 128, 64, warps=4, stages=4, programs=2),
    Shape(32, 256, 32, warps=4, stages=4, programs=3),
    Shape(32, 64, 64, warps=4, stages=4, programs=4),
    Shape(16, 128, 64, warps=4, stages=4, programs=3),
    Shape(16, 256, 32, warps=4, stages=4, programs=3),
    Shape(16, 64, 64, warps=4, stages=5, programs=4),
)
_SINGLE_PRECISION = (
    Shape(128, 64, 32, warps=8, stages=3, programs=2),
    Shape(64, 64, 32, warps=4, stages=3, programs=3),
    Shape(32, 64, 32, warps=4, stages=3, programs=4),
    Shape(16, 64, 32, warps=4, stages=3, programs=4),
)
# Small, so that little makes several tiles in every direction.
_INTERPRETED = tuple(Shape(rows, 16, 16, warps=1, stages=1, programs=1) for rows in (16, 32, 64, 128))

# Two programs where there is no device, so that each has several tiles to walk over.
_INTERPRETED_PROCESSORS = 2

_fastest: dict[Any, Shape] = {}
_in_all_shapes = ContextVar("_in_all_shapes", default=False)


@contextmanager
def in_all_shapes() -> Iterator[None]:
    """Within, kernels are launched with each candidate in turn, and none is measured."""
    token = _in_all_shapes.set(True)
    try:
        yield
    finally:
        _in_all_shapes.reset(token)


def shapes(dtype: torch.dtype, rows: int) -> list[Shape]:
    """Shapes for tiles of so many rows, the safest guess first."""
    if triton.knobs.runtime.interpret:
        known = _INTERPRETED
    else:
        known = _SINGLE_PRECISION if dtype == torch.float32 else _HALF_PRECISION
    return [shape for shape in known if shape.rows == rows]


def launch(
    kernel: Any,
    candidates: list[Shape],
    num_tiles: Callable[[Shape], int],
    *args: Any,
    cut: dict[str, int],
    **constants: Any,
) -> None:
    """Run a kernel with the candidate that is fastest for these sizes and dtypes, measured at first.

    num_tiles: of all tiles, at most. cut: sizes of the layer by the side of a tile, "rows", "columns" or
    "inner", that cuts them; where it does so without a rest, as the kernel is told (`WHOLE_COLUMNS`), it
    needs no mask there. While a CUDA graph is captured nothing can be measured: what was not measured before
    runs with the first candidate.
    """
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    constants["PRECISION"] = _precision()

    def run(shape: Shape, warmup: bool = False) -> None:
        grid = min(num_tiles(shape), shape.programs * processors(device))
        kernel.run(
            *args,
            grid=(grid,),
            warmup=warmup,
            **constants,
            **{f"WHOLE_{side.upper()}": size % getattr(shape, side) == 0 for side, size in cut.items()},
            ROWS=shape.rows,
            COLUMNS=shape.columns,
            INNER=shape.inner,
            num_warps=shape.warps,
            num_stages=shape.stages,
            maxnreg=shape.registers,
        )

    if _in_all_shapes.get():
        for shape in candidates:
            run(shape)
        return
    if len(candidates) == 1:
        run(candidates[0])
        return
    dtypes = [arg.dtype for arg in args if isinstance(arg, Tensor)]
    key = (kernel, device, tuple(candidates), *cut.values(), *dtypes, *constants.values())
    shape = _fastest.get(key)
    if shape is None and torch.cuda.is_current_stream_capturing():
        shape = candidates[0]
    elif shape is None:
        shape = _fastest[key] = _measure(kernel, candidates, run)
    run(shape)


def compile_in_threads(begin: Callable[[], _Found]) -> _Found:
    """Do what compiles kernels, in threads that are waited for; what cannot be compiled raises at the end.

    In a context of its own, since Triton forgets to leave this mode where something is raised.
    """

    def in_threads() -> _Found:
        with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool):
            return begin()

    return copy_context().run(in_threads)


def _measure(kernel: Any, candidates: list[Shape], run: Callable[..., None]) -> Shape:
    """The fastest shape that compiles, and that the device has the resources for."""
    with suppress(PTXASError):  # of one; the others are compiled, and it is met again below
        compile_in_threads(lambda: [run(shape, warmup=True) for shape in candidates])
    times = {}
    for shape in candidates:
        try:
            times[shape] = triton.testing.do_bench(partial(run, shape), warmup=5, rep=30)
        except (OutOfResources, PTXASError):
            continue
    if not times:
        raise RuntimeError(f"{kernel.__name__}: no tile shape fits this device: use the kernel 'loop'")
    fastest = min(times, key=lambda shape: times[shape])
    _log.info("%s: %s, %.3f ms, of %d", kernel.__name__, fastest, times[fastest], len(times))
    return fastest


def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _precision() -> str:
    """Of float32 operands, as torch's own products on the device have it; narrower ones are exact."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
