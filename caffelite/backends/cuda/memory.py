"""Buffers, views into them, copies between layouts and types, and to and from the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

from caffelite.backends.contract import Array, Ints, Peaks, Uploads, c_order, is_usual
from caffelite.backends.cuda.common import C_NAMES, DTYPES, THREADS, Base, blocks
from caffelite.backends.cuda.driver import Driver
from caffelite.backends.cuda.launch import Module
from caffelite.backends.cuda.peaks import peaks_of
from caffelite.backends.cuda.repeat import Repeat
from caffelite.backends.cuda.uploads import CudaUploads, Ring
from caffelite.errors import BackendError

ANY = ("float", "bf16", "unsigned char", "int", "double")
MOST_AXES = 8
CELLS = np.dtype([("value", np.float64, 8)])  # struct Cells
LAYOUT = np.dtype([("axes", np.int32), ("size", np.int64, MOST_AXES), ("stride", np.int64, MOST_AXES)], align=True)
PAIRS = [("float", "float"), ("float", "bf16"), ("bf16", "float"), ("bf16", "bf16"), ("unsigned char", "unsigned char"), ("int", "int"), ("double", "double")]
PAIRS += [("double", "float"), ("float", "double")]

EMULATED = "the GPU is emulated on the CPU (CAFFELITE_CUDA_DRIVER=emulator): correct, and very slow"

MEMORY = Module(
    "memory",
    [
        *(f"fill_dense<{t}>" for t in ANY),
        *(f"fill_any<{t}>" for t in ANY),
        *(f"{k}<{s}, {t}>" for k in ("copy_dense", "copy_any") for s, t in PAIRS),
        "assign_cells",
    ],
)


class Memory(Base, any_layout=True):
    def __init__(self, driver: Driver) -> None:
        super().__init__(driver)
        self._ring = Ring(driver)

    def supports(self, precision: str) -> str | None:
        if precision in ("float32", "tf32", "bfloat16"):
            return EMULATED if self.driver.name == "emulator" else None
        raise BackendError(f"unknown precision '{precision}'", hint="known ones: float32, tf32, bfloat16")

    def allocate(self, nbytes: int) -> Array:
        return self.driver.allocate(nbytes)

    def view(self, buffer: Array, offset: int, shape: Ints, dtype: str) -> Array:
        return self.part(buffer, offset, shape, dtype)

    def empty(self, shape: Ints, dtype: str) -> Array:
        return self.new(shape, dtype)

    def to_host(self, x: Array) -> Array:
        there = x
        if not is_usual(x):
            there = self._dense(x)
            self._move(x, there)
        values = self.driver.to_host(there, self._ring.outline(there) if self._is_small(there) else None)
        return np.array(values, np.float32 if x.dtype == DTYPES["bfloat16"] else x.dtype, order="C")

    def from_host(self, values: Array, x: Array) -> None:
        there = x if is_usual(x) else self._dense(x)
        small = self._is_small(there)
        held = self._ring.outline(there) if small else there.host()
        np.copyto(held, values, casting="unsafe")
        (self.driver.send if small else self.driver.from_host)(held, there)
        if there is not x:
            self._move(there, x)

    def _is_small(self, x: Array) -> bool:
        """Whether x goes through the ring of page-locked memory."""
        return bool(0 < x.size * x.itemsize <= self._ring.half)

    def uploads(self, nbytes: int) -> Uploads:
        return CudaUploads(self.driver, nbytes)

    def fill(self, x: Array, value: float) -> None:
        if not x.size:
            return
        if is_usual(x):
            self.launch(MEMORY, f"fill_dense<{_cname(x)}>", blocks(x.size), THREADS, x, np.float32(value), np.int64(x.size))
        else:
            self.launch(MEMORY, f"fill_any<{_cname(x)}>", blocks(x.size), THREADS, x, _layout(x), np.float32(value), np.int64(x.size))

    def assign(self, x: Array, values: Sequence[float]) -> None:
        held = np.zeros((), CELLS)
        held["value"][: len(values)] = values
        self.launch(MEMORY, "assign_cells", 1, 1, x, cast(np.void, held[()]), np.int32(len(values)))

    def copy(self, x: Array, y: Array) -> None:
        if not x.size:
            return
        types = f"<{_cname(x)}, {_cname(y)}>"
        if is_usual(x) and is_usual(y) and (x.shape == y.shape or (c_order(x.shape) and c_order(y.shape))):
            self.launch(MEMORY, f"copy_dense{types}", blocks(x.size), THREADS, x, y, np.int64(x.size))
        else:
            self.launch(MEMORY, f"copy_any{types}", blocks(x.size), THREADS, x, _layout(x), y, _layout(y), np.int64(x.size))

    def synchronize(self) -> None:
        self.driver.synchronize()

    def repeatable(self, run: Callable[[], None]) -> Callable[[], None]:
        return Repeat(self, run)

    def mark(self) -> Any:
        return self.driver.mark()

    def seconds_between(self, start: Any, stop: Any) -> float:
        return self.driver.seconds_between(start, stop)

    def peaks(self, precision: str) -> Peaks | None:
        return peaks_of(self.driver.facts(), precision)

    def peak_bytes(self) -> int | None:
        return self.driver.meter.peak

    def _move(self, x: Array, y: Array) -> None:
        self.copy(x, y)


def _cname(x: Array) -> str:
    """As common.cname; float64 may lie in memory too, though no op computes in it."""
    return C_NAMES.get(x.dtype, "double")


def _layout(x: Array) -> np.void:
    """x's axes of more than one element as the kernels' struct Layout, strides in elements."""
    axes = [(size, stride) for size, stride in zip(x.shape, x.strides) if size > 1]
    if len(axes) > MOST_AXES:
        raise BackendError(f"an array of shape {tuple(x.shape)} has more than {MOST_AXES} axes, which the cuda backend cannot copy")
    layout = np.zeros((), LAYOUT)
    layout["axes"] = len(axes)
    for i, (size, stride) in enumerate(axes):
        layout["size"][i], layout["stride"][i] = size, stride // x.itemsize
    return cast(np.void, layout[()])
