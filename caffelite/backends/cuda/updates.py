"""Reductions and update rules over the parameter arena: one launch for all its segments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from caffelite.backends.contract import JOURNAL_HEAD, Array, Segment, Update
from caffelite.backends.cuda.common import MOST_PARTIALS, THREADS, Base, blocks, cname, partial_blocks
from caffelite.backends.cuda.driver import Driver
from caffelite.backends.cuda.launch import Module, typed

RULES = ("sgd", "nesterov", "adagrad", "rmsprop", "adadelta", "adam")
TERMS = ("VALUE", "SQUARE", "ABSOLUTE", "NOT_FINITE")

UPDATES = Module(
    "updates",
    [
        *(f"sum_terms<{kind}, {term}>" for kind in ("float", "bf16") for term in TERMS),
        "sum_partials",
        "clip_scale",
        "append_value",
        *typed("scale_values"),
        *(f"{rule}_update" for rule in RULES),
    ],
)
CHUNK = 4096  # elements of the arena to a block; updates.cu knows it too
ROW = np.dtype([("start", np.int64), ("stop", np.int64), ("block", np.int64), ("lr_mult", np.float64), ("decay", np.float32)], align=True)  # struct Segment


class Updates(Base):
    def __init__(self, driver: Driver) -> None:
        super().__init__(driver)
        self._tables: dict[tuple[Segment, ...], tuple[Array, int, int]] = {}  # on the device, how many rows, how many blocks work through them

    def sum_squares(self, x: Array) -> float:
        return self._sum(x, "SQUARE")

    def sum_absolute(self, x: Array) -> float:
        return self._sum(x, "ABSOLUTE")

    def all_finite(self, x: Array) -> bool:
        return self._sum(x, "NOT_FINITE") == 0

    def scale_in_place(self, x: Array, factor: float) -> None:
        self.launch(UPDATES, f"scale_values<{cname(x)}>", blocks(x.size // 4), THREADS, x, np.float32(factor), np.int64(x.size))

    def add_sum(self, x: Array, total: Array, *, factor: float, accumulate: bool) -> None:
        self.launch(UPDATES, "sum_partials", 1, THREADS, *self._partials(x, "VALUE"), total, np.float64(factor), np.bool_(accumulate))

    def append(self, journal: Array, value: Array, *, divisor: float) -> None:
        self.launch(UPDATES, "append_value", 1, 1, journal, np.int32(journal.size - JOURNAL_HEAD), value, np.float64(divisor))

    def clip_gradients(self, g: Array, norm: Array, grad_scale: Array, *, limit: float, divisor: float) -> None:
        self.launch(UPDATES, "clip_scale", 1, THREADS, *self._partials(g, "SQUARE"), norm, grad_scale, np.float64(limit), np.float64(divisor))

    def sgd_update(self, w: Array, g: Array, h: Array, how: Update, *, momentum: float) -> None:
        self._update("sgd", (w, g, h), how, (momentum,))

    def nesterov_update(self, w: Array, g: Array, h: Array, how: Update, *, momentum: float) -> None:
        self._update("nesterov", (w, g, h), how, (momentum, 1 + momentum))

    def adagrad_update(self, w: Array, g: Array, h: Array, how: Update, *, delta: float) -> None:
        self._update("adagrad", (w, g, h), how, (delta,))

    def rmsprop_update(self, w: Array, g: Array, h: Array, how: Update, *, rms_decay: float, delta: float) -> None:
        constants = (rms_decay, 1 - rms_decay, delta)
        self._update("rmsprop", (w, g, h), how, constants)

    def adadelta_update(self, w: Array, g: Array, h: Array, v: Array, how: Update, *, momentum: float, delta: float) -> None:
        constants = (momentum, 1 - momentum, delta)
        self._update("adadelta", (w, g, h, v), how, constants)

    def adam_update(self, w: Array, g: Array, h: Array, v: Array, how: Update, *, momentum: float, momentum2: float, delta: float) -> None:
        constants = (momentum, 1 - momentum, momentum2, 1 - momentum2, delta)
        self._update("adam", (w, g, h, v), how, constants)

    def _update(self, rule: str, arrays: Sequence[Array], how: Update, constants: Sequence[float]) -> None:
        table, count, grid = self._table(how.segments)
        options = (*how.dials, np.int32(how.l1), np.int32(how.write_step), how.lowered)
        self.launch(UPDATES, f"{rule}_update", grid, THREADS, *arrays, table, np.int32(count), *options, *(np.float32(c) for c in constants))

    def _table(self, segments: Sequence[Segment]) -> tuple[Array, int, int]:
        """The segments that hold something on the device, how many they are, and how many blocks they take; copied there once."""
        held = tuple(segment for segment in segments if segment.stop > segment.start)
        if held not in self._tables:
            rows, grid = _rows_of(held)
            table = self.driver.allocate(max(1, rows.nbytes))
            if rows.nbytes:
                self.driver.from_host(rows.view(np.uint8), self.part(table, 0, (rows.nbytes,), "uint8"))
            self._tables[held] = table, len(held), grid
        return self._tables[held]

    def _sum(self, x: Array, term: str) -> float:
        """The sum of a term over x, in float64; waits for it."""
        partials, count = self._partials(x, term)
        total = self.part(partials, 8 * MOST_PARTIALS, (1,), "float64")
        self.launch(UPDATES, "sum_partials", 1, THREADS, partials, count, total, np.float64(1), np.bool_(False))
        return float(self.driver.to_host(total)[0])

    def _partials(self, x: Array, term: str) -> tuple[Array, np.int32]:
        """Scratch memory with the partial sums of a term over x, and how many they are; room for MOST_PARTIALS and one more."""
        grid, scratch = partial_blocks(x.size // 4), self.scratch(8 * MOST_PARTIALS + 8)
        self.launch(UPDATES, f"sum_terms<{cname(x)}, {term}>", grid, THREADS, x, scratch, np.int64(x.size))
        return scratch, np.int32(grid)


def _rows_of(segments: Sequence[Segment]) -> tuple[np.ndarray, int]:
    """The table for the kernels, and how many blocks work through it: each takes a CHUNK of the arena, or what a segment holds of it."""
    rows = np.zeros(len(segments), ROW)
    block = 0
    for row, segment in zip(rows, segments):
        row["start"], row["stop"], row["block"], row["lr_mult"], row["decay"] = segment.start, segment.stop, block, segment.lr_mult, segment.decay
        block += -(-segment.stop // CHUNK) - segment.start // CHUNK
    return rows, block
