"""Dropout: masks from a counter-based generator, so that every backend draws the same ones."""

from __future__ import annotations

import numpy as np

from caffelite.backends.contract import Array, Drop, DropoutKey
from caffelite.backends.numpy.common import Base, rectified, store, widen

WORDS = 1 << 14  # 64-bit words drawn at once: 65536 mask values, small enough to stay in the cache


class Dropout(Base):
    def dropout_forward(self, x: Array, y: Array, mask: Array, *, ratio: float, key: DropoutKey) -> None:
        draw_mask(mask, ratio, key)
        self.dropout_backward(x, mask, y, ratio=ratio)

    def dropout_backward(self, dy: Array, mask: Array, dx: Array, positive: Array | None = None, *, ratio: float) -> None:
        (values,) = widen(dy)
        scaled = values * values.dtype.type(1 / (1 - ratio))
        scaled *= mask
        store(dx, rectified(scaled, positive))

    def _drop(self, y: Array, drop: Drop | None) -> None:
        """What a product does with its y, once it is stored."""
        if drop is not None:
            self.dropout_forward(y, y, np.empty_like(y, np.uint8), ratio=drop.ratio, key=drop.key)


def draw_mask(mask: Array, ratio: float, key: DropoutKey) -> None:
    """Fills mask with 0 and 1 as Backend.dropout_forward's contract says."""
    words = np.random.Philox(key=np.array([key.seed, key.layer], np.uint64), counter=np.array([0, 0, int(key.iteration[0]), 0], np.uint64))
    threshold = round(ratio * 65536)
    ordered = np.moveaxis(mask, 1, -1) if mask.ndim == 4 else mask  # axes in memory order
    target = ordered.reshape(-1)  # the mask itself where it has no gaps, else a copy
    for start in range(0, target.size, 4 * WORDS):
        piece = target[start : start + 4 * WORDS]
        drawn = words.random_raw(-(-piece.size // 4)).astype("<u8", copy=False).view("<u2")
        np.greater_equal(drawn[: piece.size], threshold, out=piece.view(bool))
    if not np.shares_memory(target, mask):
        ordered[...] = target.reshape(ordered.shape)
