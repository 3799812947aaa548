"""Meter: how much of a device's memory is in use, and how much was at the most. Every driver has one, so that their figures compare."""

from __future__ import annotations

from threading import RLock
from typing import Any

ROUND = 512  # bytes: CuPy's pool gives whole multiples


class Meter:
    """used: bytes in use, in pieces of ROUND; peak: the most there were. What CUDA needs for itself (its context, code) is not counted."""

    def __init__(self) -> None:
        self.used = self.peak = 0
        self._lock = RLock()  # memory may be given back in the middle of a count: by the garbage collector

    def hold(self, memory: Any, nbytes: int) -> Held:
        """Counts `nbytes` of memory that is in use as long as the result."""
        held = Held(self, memory, rounded(nbytes))
        self._add(held.nbytes)
        return held

    def _add(self, nbytes: int) -> None:
        with self._lock:
            self.used += nbytes
            self.peak = max(self.peak, self.used)


class Held:
    """A piece of memory, counted until nothing refers to it any more."""

    __slots__ = ("__weakref__", "memory", "meter", "nbytes")

    def __init__(self, meter: Meter, memory: Any, nbytes: int) -> None:
        self.meter, self.memory, self.nbytes = meter, memory, nbytes

    def __del__(self) -> None:
        self.meter._add(-self.nbytes)


def rounded(nbytes: int) -> int:
    """As many bytes as an allocation of `nbytes` takes."""
    return -(-max(nbytes, 1) // ROUND) * ROUND
