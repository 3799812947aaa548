"""Local response normalisation. Backward computes the scales again, so forward leaves no workspace."""

from __future__ import annotations

import numpy as np

from caffelite.backends.contract import Array, Ints
from caffelite.backends.numpy.common import Base, rectified, store, widen


class Lrn(Base):
    def lrn_workspace(self, shape: Ints, dtype: str, *, size: int, alpha: float, beta: float, k: float) -> int:
        return 0

    def lrn_forward(self, x: Array, y: Array, work: Array | None, *, size: int, alpha: float, beta: float, k: float) -> None:
        (values,) = widen(x)
        scale = k + alpha / size * _window_sum(values * values, 1, size)
        store(y, values * scale**-beta)

    def lrn_backward(
        self, x: Array, y: Array, dy: Array, dx: Array, work: Array, *, size: int, alpha: float, beta: float, k: float, relu: bool = False
    ) -> None:
        values, output, gradient = widen(x, y, dy)
        scale = k + alpha / size * _window_sum(values * values, 1, size)
        ratios = _window_sum(gradient * output / scale, 1, size)
        store(dx, rectified(gradient * scale**-beta - 2 * alpha * beta / size * values * ratios, x if relu else None))

    def lrn_within_workspace(self, shape: Ints, dtype: str, *, size: int, alpha: float, beta: float) -> int:
        return 0

    def lrn_within_forward(self, x: Array, y: Array, work: Array | None, *, size: int, alpha: float, beta: float) -> None:
        (values,) = widen(x)
        scale = 1 + alpha / size**2 * _square_sum(values * values, size)
        store(y, values * scale**-beta)

    def lrn_within_backward(self, x: Array, y: Array, dy: Array, dx: Array, work: Array, *, size: int, alpha: float, beta: float, relu: bool = False) -> None:
        values, output, gradient = widen(x, y, dy)
        scale = 1 + alpha / size**2 * _square_sum(values * values, size)
        ratios = _square_sum(gradient * output / scale, size)
        store(dx, rectified(gradient * scale**-beta - 2 * alpha * beta / size**2 * values * ratios, x if relu else None))


def _square_sum(values: Array, size: int) -> Array:
    return _window_sum(_window_sum(values, 2, size), 3, size)


def _window_sum(values: Array, axis: int, size: int) -> Array:
    """Sums over `size` neighbours along an axis, centred, with zeros outside."""
    total = values.copy(order="K")
    source, target = np.moveaxis(values, axis, 0), np.moveaxis(total, axis, 0)
    for distance in range(1, min((size - 1) // 2, len(source) - 1) + 1):
        target[distance:] += source[:-distance]
        target[:-distance] += source[distance:]
    return total
