"""The driver without a device: nothing is allocated, compiled or run; it only adds up what a run would need.

Nets are built and run on it as on a GPU, so that scratch memory and copies are counted as they arise. Everything it is asked for
reads as zero. Needs neither CuPy nor a compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from caffelite.backends.contract import Array, Ints, is_usual
from caffelite.backends.cuda import CudaBackend
from caffelite.backends.cuda.array import DeviceArray
from caffelite.backends.cuda.launch import Module
from caffelite.backends.cuda.meter import Meter
from caffelite.backends.cuda.peaks import Facts


class CountingDriver:
    """Implements caffelite.backends.cuda.driver.Driver without memory of its own."""

    name = "counting"
    capturing = False

    def __init__(self) -> None:
        self.meter = Meter()
        self.tell: Callable[[str], object] = lambda stem: None

    def allocate(self, nbytes: int) -> Array:
        return DeviceArray(self.meter.hold(None, nbytes), 0, (nbytes,), (1,), np.dtype(np.uint8))

    def from_host(self, values: Any, x: Array) -> None:
        """Nothing is kept."""

    def to_host(self, x: Array, into: Any = None) -> Any:
        held = x.host() if into is None else into
        held.fill(0)
        return held

    def pinned(self, nbytes: int) -> Any:
        return np.zeros(nbytes, np.uint8)

    def send(self, values: Any, x: Array) -> None:
        """Nothing is kept."""

    def event(self) -> CountedEvent:
        return CountedEvent()

    def record(self, event: Any) -> None:
        """Nothing runs."""

    def wait(self, event: Any) -> None:
        """Nothing runs."""

    def upload(self, values: Any, x: Array, after: Any, done: Any) -> None:
        """Nothing is kept."""

    def capture(self, run: Callable[[], None]) -> CountedRecord:
        run()
        return CountedRecord()

    def load(self, module: Module) -> CountingProgram:
        return CountingProgram()

    def synchronize(self) -> None:
        """Nothing runs."""

    def mark(self) -> Any:
        return None

    def seconds_between(self, start: Any, stop: Any) -> float:
        return 0.0

    def facts(self) -> Facts | None:
        return None


class CountedEvent:
    """Happens at once."""

    def synchronize(self) -> None:
        """Nothing runs."""


class CountedRecord:
    """Launches of which nothing runs."""

    def play(self) -> None:
        """Nothing runs."""


class CountingProgram:
    """A module of which nothing runs."""

    def launch(self, name: str, grid: Ints, block: Ints, args: Sequence[Any], shared: int) -> None:
        """Nothing runs."""


class CountingBackend(CudaBackend, any_layout=True):
    """The cuda backend on a CountingDriver. Values from the host need not exist: arrays that broadcast one zero do."""

    def __init__(self) -> None:
        super(CudaBackend, self).__init__(CountingDriver())

    def from_host(self, values: Array, x: Array) -> None:
        if not is_usual(x):
            self._move(self._dense(x), x)  # as the copy on a GPU takes its way
