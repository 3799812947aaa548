"""Pooling and the dropout of what it gives: one after the other."""

from __future__ import annotations

import numpy as np

from caffelite.backends.contract import Array, DropoutKey, Ints
from caffelite.backends.numpy.dropout import Dropout
from caffelite.backends.numpy.pooling import Pooling, no_winner


class PoolDropout(Pooling, Dropout):
    def max_pool_dropout_forward(self, x: Array, y: Array, mask: Array | None, *, ratio: float, key: DropoutKey, kernel: Ints, stride: Ints, pad: Ints) -> None:
        self.max_pool_forward(x, y, mask, kernel=kernel, stride=stride, pad=pad)
        keep = np.empty_like(y, np.uint8)
        self.dropout_forward(y, y, keep, ratio=ratio, key=key)
        if mask is not None:
            mask[keep == 0] = no_winner(mask)

    def max_pool_dropout_backward(
        self, dy: Array, mask: Array, dx: Array, positive: Array | None = None, *, ratio: float, kernel: Ints, stride: Ints, pad: Ints
    ) -> None:
        kept = np.empty_like(dy)
        self.dropout_backward(dy, (mask != no_winner(mask)).view(np.uint8), kept, ratio=ratio)
        self.max_pool_backward(kept, mask, dx, positive, kernel=kernel, stride=stride, pad=pad)

    def ave_pool_dropout_forward(self, x: Array, y: Array, mask: Array | None, *, ratio: float, key: DropoutKey, kernel: Ints, stride: Ints, pad: Ints) -> None:
        self.ave_pool_forward(x, y, kernel=kernel, stride=stride, pad=pad)
        self.dropout_forward(y, y, np.empty_like(y, np.uint8) if mask is None else mask, ratio=ratio, key=key)

    def ave_pool_dropout_backward(
        self, dy: Array, mask: Array, dx: Array, positive: Array | None = None, *, ratio: float, kernel: Ints, stride: Ints, pad: Ints
    ) -> None:
        kept = np.empty_like(dy)
        self.dropout_backward(dy, mask, kept, ratio=ratio)
        self.ave_pool_backward(kept, dx, positive, kernel=kernel, stride=stride, pad=pad)
