"""Ways to the device that nobody waits for: whole blocks on a stream of their own, and small arrays in the order of the ops."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from caffelite.backends.contract import Array
from caffelite.backends.cuda.driver import Driver, Event
from caffelite.errors import BackendError

ALIGN = 64


class CudaUploads:
    """Implements caffelite.backends.contract.Uploads with two buffers on the device: a block travels into one while ops read the other.

    arrived[i] happens when buffer i holds its block, used[i] when the ops that read it have run; a copy into it waits for the latter.
    """

    def __init__(self, driver: Driver, nbytes: int) -> None:
        self._driver, self._nbytes = driver, nbytes
        self._buffers = [driver.allocate(nbytes) for _ in range(2)]
        self._arrived, self._used = [driver.event(), driver.event()], [driver.event(), driver.event()]
        for event in self._used:
            driver.record(event)  # whoever had this memory before, and the zeroing of it, come first
        self._sent = self._received = 0
        # Memory must not go back while a copy into it is under way, be this object closed or forgotten.
        self._finalizer = weakref.finalize(self, _settle, self._buffers, self._arrived)

    def block(self) -> Array:
        return self._driver.pinned(self._nbytes)

    def send(self, block: Array) -> Callable[[], None]:
        if self._sent > self._received:
            raise RuntimeError("send() twice without receive()")
        number = self._sent % 2
        self._driver.upload(block, self._buffers[number], self._used[number], self._arrived[number])
        self._sent += 1
        return self._arrived[number].synchronize

    def receive(self) -> Array:
        if self._received == self._sent:
            raise RuntimeError("receive() before send()")
        number = self._received % 2
        self._driver.record(self._used[1 - number])
        self._driver.wait(self._arrived[number])
        self._received += 1
        return self._buffers[number]

    def close(self) -> None:
        self._finalizer()


def _settle(buffers: list[Array], arrived: list[Event]) -> None:
    with suppress(BackendError):  # of a device that has stopped, which whoever uses it next will hear
        for event in arrived:
            event.synchronize()
    buffers.clear()


class Ring:
    """Page-locked memory through which small arrays go to the device and come from it. Its two halves are filled in turn; a half is filled again only
    when the copies out of it have been made."""

    def __init__(self, driver: Driver, half: int = 1 << 20) -> None:
        self.half = half  # bytes: the largest array that it takes
        self._driver = driver
        self._memory: Any = None  # got at the first use
        self._left: list[Event] = []  # happens when the copies out of a half have been made
        self._number = self._at = 0

    def take(self, nbytes: int) -> Any:
        """`nbytes` of it (numpy.ndarray of uint8), to be filled and sent, or read, before the next call. RuntimeError while ops are recorded."""
        if self._driver.capturing:  # an event of a half's end would end up in the record, and never happen
            raise RuntimeError("an op that is recorded copies from or to the host, or waits")
        if self._memory is None:
            self._memory = self._driver.pinned(2 * self.half)
            self._left = [self._driver.event(), self._driver.event()]
        if self._at + nbytes > self.half:
            self._driver.record(self._left[self._number])
            self._number, self._at = 1 - self._number, 0
            self._left[self._number].synchronize()
        start = self._number * self.half + self._at
        self._at += -(-nbytes // ALIGN) * ALIGN
        return self._memory[start : start + nbytes]

    def outline(self, x: Array) -> Any:
        """As take, as a numpy.ndarray of x's shape, type and strides, which must leave no gaps."""
        return np.ndarray(x.shape, x.dtype, self.take(x.size * x.itemsize), 0, x.strides)
