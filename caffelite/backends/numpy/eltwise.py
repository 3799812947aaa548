"""Sums, products and maxima of several arrays of one shape."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from caffelite.backends.contract import Array
from caffelite.backends.numpy.common import Base, rectified, store, widen


class Eltwise(Base):
    def eltwise_sum(self, xs: Sequence[Array], y: Array, coeffs: Sequence[float], positive: Array | None = None, *, relu: bool = False) -> None:
        values = widen(*xs)
        total = values[0] * values[0].dtype.type(coeffs[0])
        for value, coeff in zip(values[1:], coeffs[1:]):
            total += value if coeff == 1 else value * value.dtype.type(coeff)
        store(y, rectified(np.maximum(total, 0) if relu else total, positive))

    def eltwise_product_forward(self, xs: Sequence[Array], y: Array) -> None:
        store(y, _product(widen(*xs)))

    def eltwise_product_backward(self, xs: Sequence[Array], y: Array, dy: Array, dx: Array, *, index: int, stable: bool) -> None:
        *values, output, gradient = widen(*xs, y, dy)
        if stable:
            store(dx, _product([*(v for i, v in enumerate(values) if i != index), gradient]))
        else:
            store(dx, output / values[index] * gradient)

    def eltwise_max_forward(self, xs: Sequence[Array], y: Array, winner: Array) -> None:
        values = widen(*xs)
        first = values[0] > values[1]
        best: Array = np.where(first, values[0], values[1])
        winner[...] = ~first
        for index, value in enumerate(values[2:], 2):
            greater = value > best
            np.copyto(best, value, where=greater)
            np.copyto(winner, np.uint8(index), where=greater)
        store(y, best)

    def eltwise_max_backward(self, winner: Array, dy: Array, dx: Array, *, index: int) -> None:
        store(dx, np.where(winner == index, dy, dy.dtype.type(0)))


def _product(values: Sequence[Array]) -> Array:
    total = values[0] * values[1]
    for value in values[2:]:
        total *= value
    return total
