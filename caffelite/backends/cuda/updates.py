"""Reductions and update rules over the parameter arena: one launch for all its segments."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np

from caffelite.backends.contract import Array, Segment
from caffelite.backends.cuda.common import MOST_PARTIALS, THREADS, Base, blocks, cname, partial_blocks
from caffelite.backends.cuda.driver import Driver
from caffelite.backends.cuda.launch import Module, typed

RULES = ("sgd", "nesterov", "adagrad", "rmsprop", "adadelta", "adam")
TERMS = ("SQUARE", "ABSOLUTE", "NOT_FINITE")

UPDATES = Module(
    "updates",
    [
        *(f"sum_terms<{kind}, {term}>" for kind in ("float", "bf16") for term in TERMS),
        "sum_partials",
        *typed("scale_values"),
        *(f"{rule}_update" for rule in RULES),
    ],
)
CHUNK = 4096  # elements of the arena to a block; updates.cu knows it too
ROW = np.dtype([("start", np.int64), ("stop", np.int64), ("block", np.int64), ("rate", np.float32), ("decay", np.float32)])  # struct Segment


class Updates(Base):
    def __init__(self, driver: Driver) -> None:
        super().__init__(driver)
        # By the segments' places: the table on the device, how many blocks work through it, and the values it holds.
        self._tables: dict[tuple[tuple[int, int], ...], tuple[Array, int, tuple[Any, ...]]] = {}

    def sum_squares(self, x: Array) -> float:
        return self._sum(x, "SQUARE")

    def sum_absolute(self, x: Array) -> float:
        return self._sum(x, "ABSOLUTE")

    def all_finite(self, x: Array) -> bool:
        return self._sum(x, "NOT_FINITE") == 0

    def scale_in_place(self, x: Array, factor: float) -> None:
        self.launch(UPDATES, f"scale_values<{cname(x)}>", blocks(x.size // 4), THREADS, x, np.float32(factor), np.int64(x.size))

    def sgd_update(self, w: Array, g: Array, h: Array, segments: Sequence[Segment], *, momentum: float, l1: bool, grad_scale: float, write_step: bool) -> None:
        self._update("sgd", (w, g, h), segments, (momentum,), l1=l1, grad_scale=grad_scale, write_step=write_step)

    def nesterov_update(
        self, w: Array, g: Array, h: Array, segments: Sequence[Segment], *, momentum: float, l1: bool, grad_scale: float, write_step: bool
    ) -> None:
        self._update("nesterov", (w, g, h), segments, (momentum, 1 + momentum), l1=l1, grad_scale=grad_scale, write_step=write_step)

    def adagrad_update(self, w: Array, g: Array, h: Array, segments: Sequence[Segment], *, delta: float, l1: bool, grad_scale: float, write_step: bool) -> None:
        self._update("adagrad", (w, g, h), segments, (delta,), l1=l1, grad_scale=grad_scale, write_step=write_step)

    def rmsprop_update(
        self, w: Array, g: Array, h: Array, segments: Sequence[Segment], *, rms_decay: float, delta: float, l1: bool, grad_scale: float, write_step: bool
    ) -> None:
        constants = (rms_decay, 1 - rms_decay, delta)
        self._update("rmsprop", (w, g, h), segments, constants, l1=l1, grad_scale=grad_scale, write_step=write_step)

    def adadelta_update(
        self,
        w: Array,
        g: Array,
        h: Array,
        v: Array,
        segments: Sequence[Segment],
        *,
        momentum: float,
        delta: float,
        l1: bool,
        grad_scale: float,
        write_step: bool,
    ) -> None:
        constants = (momentum, 1 - momentum, delta)
        self._update("adadelta", (w, g, h, v), segments, constants, l1=l1, grad_scale=grad_scale, write_step=write_step)

    def adam_update(
        self,
        w: Array,
        g: Array,
        h: Array,
        v: Array,
        segments: Sequence[Segment],
        *,
        momentum: float,
        momentum2: float,
        delta: float,
        step: int,
        l1: bool,
        grad_scale: float,
        write_step: bool,
    ) -> None:
        correction = sqrt(1 - momentum2**step) / (1 - momentum**step)
        scaled = [segment._replace(rate=segment.rate * correction) for segment in segments]
        constants = (momentum, 1 - momentum, momentum2, 1 - momentum2, delta)
        self._update("adam", (w, g, h, v), scaled, constants, l1=l1, grad_scale=grad_scale, write_step=write_step)

    def _update(
        self, rule: str, arrays: Sequence[Array], segments: Sequence[Segment], constants: Sequence[float], *, l1: bool, grad_scale: float, write_step: bool
    ) -> None:
        table, count, grid = self._table(segments)
        options = (np.float32(grad_scale), np.int32(l1), np.int32(write_step))
        self.launch(UPDATES, f"{rule}_update", grid, THREADS, *arrays, table, np.int32(count), *options, *(np.float32(c) for c in constants))

    def _table(self, segments: Sequence[Segment]) -> tuple[Array, int, int]:
        """The segments that hold something on the device, how many they are, and how many blocks they take.

        Segments of the same places share one table, copied anew only when a rate or a decay has changed.
        """
        held = tuple(segment for segment in segments if segment.stop > segment.start)
        places = tuple((segment.start, segment.stop) for segment in held)
        table, grid, values = self._tables.get(places, (None, 0, ()))
        if table is None or values != held:
            rows, grid = _rows_of(held)
            table = table if table is not None else self.driver.allocate(max(1, rows.nbytes))
            if rows.nbytes:
                self.driver.from_host(rows.view(np.uint8), self.part(table, 0, (rows.nbytes,), "uint8"))
            self._tables[places] = table, grid, held
        return table, len(held), grid

    def _sum(self, x: Array, term: str) -> float:
        """The sum of a term over x, in float64; waits for it."""
        grid, offset = partial_blocks(x.size // 4), 8 * MOST_PARTIALS
        scratch = self.scratch(offset + 8)
        total = self.part(scratch, offset, (8,), "uint8")
        self.launch(UPDATES, f"sum_terms<{cname(x)}, {term}>", grid, THREADS, x, scratch, np.int64(x.size))
        self.launch(UPDATES, "sum_partials", 1, THREADS, scratch, np.int32(grid), total)
        return float(self.driver.to_host(total).view(np.float64)[0])


def _rows_of(segments: Sequence[Segment]) -> tuple[Any, int]:
    """The table for the kernels, and how many blocks work through it: each takes a CHUNK of the arena, or what a segment holds of it."""
    rows = np.zeros(len(segments), ROW)
    block = 0
    for row, segment in zip(rows, segments):
        row["start"], row["stop"], row["block"], row["rate"], row["decay"] = segment.start, segment.stop, block, segment.rate, segment.decay
        block += -(-segment.stop // CHUNK) - segment.start // CHUNK
    return rows, block
