"""Dropout: masks from a counter-based generator, so that every backend draws the same ones; kernels/dropout.cu."""

from __future__ import annotations

import numpy as np

from caffelite.backends.contract import Array, Drop, DropoutKey
from caffelite.backends.cuda.common import THREADS, Base, blocks, cname
from caffelite.backends.cuda.elementwise import vectors
from caffelite.backends.cuda.launch import Module, typed

DROPOUT = Module("dropout", typed("dropout_forward", "dropout_backward"))
DRAWN = 16  # elements that a thread draws at once
DROP = np.dtype([("factor", np.float32), ("threshold", np.uint32), ("seed", np.uint64), ("layer", np.uint64)])  # struct Drop


class Dropout(Base):
    def dropout_forward(self, x: Array, y: Array, mask: Array, *, ratio: float, key: DropoutKey) -> None:
        _forward(self, x, y, mask, Drop(ratio, key))

    def dropout_backward(self, dy: Array, mask: Array, dx: Array, positive: Array | None = None, *, ratio: float) -> None:
        _backward(self, dy, mask, dx, positive, factor(ratio))


def drop_in_place(ops: Base, y: Array, drop: Drop | None) -> None:
    """What `drop` asks of a product, for one whose kernels do not do it themselves."""
    if drop is not None:
        _forward(ops, y, y, ops.part(ops.scratch(y.size, "dropout"), 0, y.shape, np.dtype(np.uint8)), drop)


def take_on(ops: Base, dx: Array, positive: Array | None, ratio: float | None) -> None:
    """What `positive` and `ratio` ask of a data gradient, likewise."""
    if positive is not None:
        _backward(ops, dx, None, dx, positive, np.float32(1) if ratio is None else factor(ratio))


def _forward(ops: Base, x: Array, y: Array, mask: Array, drop: Drop) -> None:
    ops.launch(DROPOUT, f"dropout_forward<{cname(x)}>", blocks(-(-x.size // DRAWN)), THREADS, x, y, mask, drop.key.iteration, as_struct(drop), np.int64(x.size))


def _backward(ops: Base, dy: Array, mask: Array | None, dx: Array, positive: Array | None, scale: np.float32) -> None:
    ops.launch(DROPOUT, f"dropout_backward<{cname(dy)}>", blocks(vectors(dy)), THREADS, dy, mask, positive, dx, scale, np.int64(dy.size))


def as_struct(drop: Drop) -> np.void:
    """The kernels' struct Drop."""
    return np.void((factor(drop.ratio), threshold(drop.ratio), drop.key.seed, drop.key.layer), DROP)


def factor(ratio: float) -> np.float32:
    """What is kept is multiplied by it."""
    return np.float32(1 / (1 - ratio))


def threshold(ratio: float) -> np.uint32:
    """The least of the 16-bit values that keep an element."""
    return np.uint32(round(ratio * 65536))
