"""Buffers, views into them, copies between types."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np

from caffelite.backends.contract import Array, Ints, Peaks, Uploads, strides_of
from caffelite.backends.numpy.common import BFLOAT16, Base, store
from caffelite.errors import BackendError

ALIGN = 64
DTYPES = {name: np.dtype(name) for name in ("float32", "float64", "uint8", "int32")} | {"bfloat16": BFLOAT16}


class HostUploads:
    """Implements caffelite.backends.contract.Uploads where the host is the device: blocks are copied when they are sent."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._sent: deque[Array] = deque()

    def block(self) -> Array:
        return np.zeros(self._nbytes, np.uint8)

    def send(self, block: Array) -> Callable[[], None]:
        self._sent.append(block.copy())
        return lambda: None

    def receive(self) -> Array:
        return self._sent.popleft()

    def close(self) -> None:
        self._sent.clear()


class Memory(Base):
    def supports(self, precision: str) -> str | None:
        if precision == "float32":
            return None
        if precision == "bfloat16":
            return "NumPy has no bfloat16 arithmetic: every op converts to float32 and back, correct but slower than float32"
        if precision == "tf32":
            raise BackendError("the numpy backend cannot run in tf32, which is a format of CUDA devices", hint="use float32 or bfloat16")
        raise BackendError(f"unknown precision '{precision}'", hint="known ones: float32, tf32, bfloat16")

    def allocate(self, nbytes: int) -> Array:
        raw = np.zeros(nbytes + ALIGN, np.uint8)
        start = -raw.ctypes.data % ALIGN
        return raw[start : start + nbytes]

    def view(self, buffer: Array, offset: int, shape: Ints, dtype: str) -> Array:
        kind = DTYPES[dtype]
        return np.ndarray(shape, kind, buffer, offset, strides_of(shape, kind.itemsize))

    def empty(self, shape: Ints, dtype: str) -> Array:
        return self.view(self.allocate(prod(shape) * DTYPES[dtype].itemsize), 0, shape, dtype)

    def to_host(self, x: Array) -> Array:
        return np.array(x, np.float32 if x.dtype == BFLOAT16 else x.dtype, order="C")

    def from_host(self, values: Array, x: Array) -> None:
        store(x, values)

    def uploads(self, nbytes: int) -> Uploads:
        return HostUploads(nbytes)

    def fill(self, x: Array, value: float) -> None:
        x.fill(value)

    def assign(self, x: Array, values: Sequence[float]) -> None:
        x[: len(values)] = values

    def copy(self, x: Array, y: Array) -> None:
        store(y, x.reshape(y.shape))

    def synchronize(self) -> None:
        """Every op has finished when it returns."""

    def repeatable(self, run: Callable[[], None]) -> Callable[[], None]:
        return run  # a record would save nothing here

    def mark(self) -> Any:
        return time.perf_counter()

    def seconds_between(self, start: Any, stop: Any) -> float:
        return float(stop - start)

    def peaks(self, precision: str) -> Peaks | None:
        return None

    def peak_bytes(self) -> int | None:
        return None
