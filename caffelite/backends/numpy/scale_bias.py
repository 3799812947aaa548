"""Multiplying by and adding a broadcast operand."""

from __future__ import annotations

import numpy as np

from caffelite.backends.contract import Array
from caffelite.backends.numpy.common import Base, store, store_gradient, widen


class ScaleBias(Base):
    def scale_forward(self, x: Array, s: Array, b: Array | None, y: Array) -> None:
        values, factor = widen(x, s)
        product = values * factor
        if b is not None:
            product += b.astype(product.dtype, copy=False)
        store(y, product)

    def scale_backward_data(self, dy: Array, s: Array, dx: Array) -> None:
        gradient, factor = widen(dy, s)
        store(dx, gradient * factor)

    def scale_backward_factor(self, x: Array, dy: Array, ds: Array, *, accumulate: bool) -> None:
        values, gradient = widen(x, dy)
        store_gradient(ds, _sum_to(gradient * values, ds), accumulate)

    def bias_forward(self, x: Array, b: Array, y: Array) -> None:
        values, operand = widen(x, b)
        store(y, values + operand)

    def bias_backward(self, dy: Array, db: Array, *, accumulate: bool) -> None:
        store_gradient(db, _sum_to(widen(dy)[0], db), accumulate)


def _sum_to(values: Array, target: Array) -> Array:
    """Sums over the axes where the target has size 1, in float64."""
    axes = tuple(axis for axis, size in enumerate(target.shape) if size == 1)
    return np.sum(values, axis=axes, dtype=np.float64, keepdims=True) if axes else values
