"""Normalisation across channels and max pooling of what it gives: one after the other."""

from __future__ import annotations

import numpy as np

from caffelite.backends.contract import Array, Ints
from caffelite.backends.numpy.lrn import Lrn
from caffelite.backends.numpy.pooling import Pooling


class LrnPool(Pooling, Lrn):
    def lrn_max_pool_pays(self, shape: Ints, dtype: str, *, size: int, kernel: Ints, stride: Ints) -> bool:
        return False

    def lrn_max_pool_forward(
        self, x: Array, y: Array, mask: Array | None, *, size: int, alpha: float, beta: float, k: float, kernel: Ints, stride: Ints, pad: Ints
    ) -> None:
        normalised = np.empty_like(x)
        self.lrn_forward(x, normalised, None, size=size, alpha=alpha, beta=beta, k=k)
        self.max_pool_forward(normalised, y, mask, kernel=kernel, stride=stride, pad=pad)

    def lrn_max_pool_backward(
        self,
        x: Array,
        dy: Array,
        mask: Array,
        dx: Array,
        *,
        size: int,
        alpha: float,
        beta: float,
        k: float,
        kernel: Ints,
        stride: Ints,
        pad: Ints,
        relu: bool = False,
    ) -> None:
        y, between = np.empty_like(x), np.empty_like(x)
        work = np.empty(self.lrn_workspace(x.shape, x.dtype.name, size=size, alpha=alpha, beta=beta, k=k), np.uint8)
        self.lrn_forward(x, y, work, size=size, alpha=alpha, beta=beta, k=k)
        self.max_pool_backward(dy, mask, between, kernel=kernel, stride=stride, pad=pad)
        self.lrn_backward(x, y, between, dx, work, size=size, alpha=alpha, beta=beta, k=k, relu=relu)
