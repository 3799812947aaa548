"""What the CUDA backend asks of a machine: memory, copies, programs. Two implementations: CuPy, and an emulator on the CPU.

CAFFELITE_CUDA_DRIVER chooses: "cupy" (a GPU; the default) or "emulator" (the same kernels compiled by g++, for tests and for reading along).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from caffelite import environment
from caffelite.backends.contract import Array, Ints
from caffelite.backends.cuda.launch import Module
from caffelite.backends.cuda.meter import Meter
from caffelite.backends.cuda.peaks import Facts
from caffelite.errors import BackendError

DRIVERS = ("cupy", "emulator")


class Program(Protocol):
    """A compiled Module."""

    def launch(self, name: str, grid: Ints, block: Ints, args: Sequence[Any], shared: int) -> None:
        """Runs the kernel of that name expression. args: arrays of the driver, None (a null pointer), NumPy scalars, which are
        passed by value in their own size, or Boxes. shared: bytes of dynamic shared memory. BackendError when it cannot run."""
        ...


class Record(Protocol):
    """Launches, recorded."""

    def play(self) -> None:
        """Runs them all, in their order, on the arrays they were recorded with, whose memory the caller keeps."""


class Event(Protocol):
    """A moment in what a device does, named by Driver.record or Driver.upload; before that it counts as past."""

    def synchronize(self) -> None:
        """Waits, on the host, until it has happened."""
        ...


class Driver(Protocol):
    """A device and its memory. Kernels, `send`, `from_host` and `to_host` run in the order of the calls; uploads run beside them.

    An Array has shape, strides (bytes), dtype, size, ndim, itemsize and reshape, as numpy.ndarray has them.
    """

    name: str
    meter: Meter
    tell: Callable[[str], object]  # called with a module's stem before it is compiled, which takes seconds; does nothing unless set

    @property
    def capturing(self) -> bool:
        """Whether `capture` is at work."""
        ...

    def allocate(self, nbytes: int) -> Array:
        """`nbytes` zeroed bytes as an array of uint8, aligned to 64. OutOfMemoryError when there is not as much."""
        ...

    def from_host(self, values: Any, x: Array) -> None:
        """Copies a numpy.ndarray of x's shape, dtype and strides, without gaps, into x."""
        ...

    def to_host(self, x: Array, into: Any = None) -> Any:
        """A numpy.ndarray of x's shape, dtype and strides, x being without gaps: `into`, or a new one. Waits for what runs."""
        ...

    def pinned(self, nbytes: int) -> Any:
        """`nbytes` zeroed bytes of the host's memory, page-locked, as a numpy.ndarray of uint8. BackendError when there are not that many."""
        ...

    def send(self, values: Any, x: Array) -> None:
        """As from_host, from page-locked memory and without waiting: `values` must not change until an event recorded later has happened."""
        ...

    def event(self) -> Event:
        """A new event."""
        ...

    def record(self, event: Event) -> None:
        """The event happens when everything so far, uploads aside, has run."""
        ...

    def wait(self, event: Event) -> None:
        """What follows, uploads aside, runs after the event."""
        ...

    def upload(self, values: Any, x: Array, after: Event, done: Event) -> None:
        """Copies page-locked bytes into x (uint8) beside everything else, after the uploads so far and `after`; then `done` happens, before
        which `values` must not change and nothing may read x."""
        ...

    def load(self, module: Module) -> Program:
        """Compiles a module for this device, or finds it compiled. BackendError when that fails."""
        ...

    def capture(self, run: Callable[[], None]) -> Record:
        """What run() launches, without running it. Memory that it allocates is zeroed by the record. RuntimeError where it copies from or to
        the host, or waits; BackendError when the driver refuses."""
        ...

    def synchronize(self) -> None:
        """Waits until everything so far has run."""
        ...

    def mark(self) -> Any:
        """A point among what runs: everything asked for so far comes before it."""
        ...

    def seconds_between(self, start: Any, stop: Any) -> float:
        """The time from one mark to another on the device's clock; waits until `stop` is reached."""
        ...

    def facts(self) -> Facts | None:
        """What the device is made of; None where there is none."""
        ...


def refuse_while_capturing(driver: Driver) -> None:
    """For what a record cannot hold."""
    if driver.capturing:
        raise RuntimeError("an op that is recorded copies from or to the host, or waits")


def choose(device: int = 0) -> Driver:
    """The driver that the environment names, on GPU number `device`. BackendError when it does not load, SpecError where there is none of that name."""
    if environment.choice(environment.CUDA_DRIVER, DRIVERS) == "emulator":
        from caffelite.backends.cuda.emulator import EmulatorDriver

        if device:
            raise BackendError(f"there is no GPU {device}: the emulator is GPU 0", hint="choose 0, or unset CAFFELITE_CUDA_DRIVER")
        return EmulatorDriver()
    from caffelite.backends.cuda.cupy_driver import CupyDriver

    return CupyDriver(device)
