"""What the CUDA backend asks of a machine: memory, copies, programs. Two implementations: CuPy, and an emulator on the CPU.

CAFFELITE_CUDA_DRIVER chooses: "cupy" (a GPU; the default) or "emulator" (the same kernels compiled by g++, for tests and for reading along).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from caffelite.backends.contract import Array, Ints
from caffelite.backends.cuda.launch import Module
from caffelite.errors import BackendError

ENVIRONMENT = "CAFFELITE_CUDA_DRIVER"
DRIVERS = ("cupy", "emulator")


class Program(Protocol):
    """A compiled Module."""

    def launch(self, name: str, grid: Ints, block: Ints, args: Sequence[Any], shared: int) -> None:
        """Runs the kernel of that name expression. args: arrays of the driver, None (a null pointer) or NumPy scalars, which are
        passed by value in their own size. shared: bytes of dynamic shared memory. BackendError when it cannot run."""
        ...


class Record(Protocol):
    """Launches, recorded."""

    def play(self) -> None:
        """Runs them all, in their order, on the arrays they were recorded with, whose memory the caller keeps."""
        ...


class Driver(Protocol):
    """A device and its memory. An Array has shape, strides (bytes), dtype, size, ndim, itemsize and reshape, as numpy.ndarray has them."""

    name: str
    device_name: str

    @property
    def capturing(self) -> bool:
        """Whether `capture` is at work."""
        ...

    def allocate(self, nbytes: int) -> Array:
        """`nbytes` zeroed bytes as an array of uint8, aligned to 64. BackendError when memory runs out."""
        ...

    def view(self, buffer: Array, offset: int, shape: Ints, strides: Ints, dtype: Any) -> Array:
        """An array of NumPy type `dtype` at byte `offset` of `buffer`."""
        ...

    def is_array(self, x: Any) -> bool:
        """Whether x is an array of this driver."""
        ...

    def from_host(self, values: Any, x: Array) -> None:
        """Copies a numpy.ndarray of x's shape, dtype and strides, without gaps, into x."""
        ...

    def to_host(self, x: Array) -> Any:
        """A numpy.ndarray of x's shape, dtype and strides, x being without gaps; waits for what runs."""
        ...

    def load(self, module: Module) -> Program:
        """Compiles a module for this device, or finds it compiled. BackendError when that fails."""
        ...

    def capture(self, run: Callable[[], None]) -> Record:
        """What run() launches, without running it. Memory that it allocates is zeroed by the record. RuntimeError where it copies from or to
        the host, or waits; BackendError when the driver refuses."""
        ...

    def seconds(self, run: Callable[[], None]) -> float | None:
        """How long what run() launches takes on the device; None where that cannot be told."""
        ...

    def synchronize(self) -> None:
        """Waits until everything so far has run."""
        ...


def choose(device: int = 0) -> Driver:
    """The driver that the environment names, on GPU number `device`. BackendError when it does not load."""
    name = os.environ.get(ENVIRONMENT) or "cupy"
    if name == "emulator":
        from caffelite.backends.cuda.emulator import EmulatorDriver

        if device:
            raise BackendError(f"there is no GPU {device}: the emulator is GPU 0", hint="choose 0, or unset CAFFELITE_CUDA_DRIVER")
        return EmulatorDriver()
    if name == "cupy":
        from caffelite.backends.cuda.cupy_driver import CupyDriver

        return CupyDriver(device)
    raise BackendError(f"{ENVIRONMENT} is '{name}'", hint=f"known ones: {', '.join(DRIVERS)}")
