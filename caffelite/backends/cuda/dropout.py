"""Dropout: masks from a counter-based generator, so that every backend draws the same ones; kernels/dropout.cu."""

from __future__ import annotations

import numpy as np

from caffelite.backends.contract import Array, DropoutKey
from caffelite.backends.cuda.common import THREADS, Base, blocks, cname
from caffelite.backends.cuda.elementwise import vectors
from caffelite.backends.cuda.launch import Module, typed

DROPOUT = Module("dropout", typed("dropout_forward", "dropout_backward"))
DRAWN = 16  # elements that a thread draws at once


class Dropout(Base):
    def dropout_forward(self, x: Array, y: Array, mask: Array, *, ratio: float, key: DropoutKey) -> None:
        numbers = (factor(ratio), threshold(ratio), np.uint64(key.seed), np.uint64(key.layer), key.iteration)
        self.launch(DROPOUT, f"dropout_forward<{cname(x)}>", blocks(-(-x.size // DRAWN)), THREADS, x, y, mask, *numbers, np.int64(x.size))

    def dropout_backward(self, dy: Array, mask: Array, dx: Array, positive: Array | None = None, *, ratio: float) -> None:
        self.launch(DROPOUT, f"dropout_backward<{cname(dy)}>", blocks(vectors(dy)), THREADS, dy, mask, positive, dx, factor(ratio), np.int64(dy.size))


def factor(ratio: float) -> np.float32:
    """What is kept is multiplied by it."""
    return np.float32(1 / (1 - ratio))


def threshold(ratio: float) -> np.uint32:
    """The least of the 16-bit values that keep an element."""
    return np.uint32(round(ratio * 65536))
