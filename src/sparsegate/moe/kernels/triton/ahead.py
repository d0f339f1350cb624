"""The kernels compiled for a device that need not be there, into the cache that a first call looks into."""

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from .launch import compile_in_threads, in_all_shapes


class Compiled(NamedTuple):
    """What became of a kernel.

    constants: those of its arguments that are compiled in, the shape of its tiles among them. warps, stages:
    of the same `Shape`. shared: bytes of shared memory. assembly: "ptx", text, and "cubin", for the device.
    """

    name: str
    constants: dict[str, Any]
    warps: int
    stages: int
    shared: int
    assembly: dict[str, Any]


def compiled_for(capability: int, call: Callable[[], object]) -> list[Compiled]:
    """Compile what `call` would launch, in every tile shape that is worth trying.

    capability: compute capability of a CUDA device, times ten (90: Hopper). `call` computes on the CPU, with
    tensors of the shapes and dtypes in question; no kernel is run, so that its results are whatever was in
    memory. Those tensors should come from `torch.empty`, since what is never written takes no memory. What is
    compiled is left in Triton's cache (`TRITON_CACHE_DIR`), where the same version of Triton finds it on a
    machine with such a device.
    """
    wanted: dict[str, tuple[Any, dict[str, Any]]] = {}

    def collect(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        wanted.setdefault(compile["specialization_data"], (fn.jit_function, compile["constants"]))
        return True  # so that it is neither compiled now nor launched

    hooks, device = triton.knobs.runtime, _Absent(capability)
    plain_hook, plain_driver = hooks.jit_cache_hook, driver._active
    driver.set_active(device)
    try:
        hooks.jit_cache_hook = collect
        with in_all_shapes():
            call()
        hooks.jit_cache_hook = None
        pending = compile_in_threads(
            lambda: [kernel.preload(specialization) for specialization, (kernel, _) in wanted.items()]
        )
        return [
            _compiled(kernel, constants, future.result())
            for (kernel, constants), future in zip(wanted.values(), pending, strict=True)
        ]
    finally:
        hooks.jit_cache_hook = plain_hook
        driver._active = plain_driver
        for kernel, _ in wanted.values():
            kernel.device_caches.pop(device, None)


def _compiled(kernel: Any, constants: dict[Any, Any], found: Any) -> Compiled:
    named = {kernel.arg_names[place]: value for (place,), value in constants.items()}
    of = found.metadata
    return Compiled(kernel.__name__, named, of.num_warps, of.num_stages, of.shared, found.asm)


class _Absent:
    """The driver of a device that is not there."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> "_Absent":
        """What its kernels are kept under, apart from those of real devices, which have numbers."""
        return self

    def get_current_stream(self, device: "_Absent") -> int:
        return 0
