"""Batch normalisation over axis 1."""

from __future__ import annotations

import numpy as np

from caffelite.backends.contract import Array
from caffelite.backends.numpy.common import Base, column_sums, per_channel, rectified, rows, store, store_gradient, widen


class BatchNorm(Base):
    def batch_norm_statistics(self, x: Array, mean: Array, variance: Array) -> None:
        matrix = rows(widen(x)[0])
        centre = column_sums(matrix) / len(matrix)
        distance = matrix - centre.astype(matrix.dtype)
        store(mean, centre)
        store(variance, column_sums(distance * distance) / len(matrix))

    def batch_norm_accumulate(
        self,
        mean: Array,
        variance: Array,
        mean_sum: Array,
        variance_sum: Array,
        weight: Array,
        skip: Array | None = None,
        *,
        fraction: float,
        correction: float,
    ) -> None:
        if skip is not None and skip[0]:
            return
        store(mean_sum, fraction * mean_sum + mean)
        store(variance_sum, fraction * variance_sum + correction * variance)
        store(weight, fraction * weight + 1)

    def batch_norm_global_statistics(self, mean_sum: Array, variance_sum: Array, weight: Array, mean: Array, variance: Array) -> None:
        factor = np.where(weight == 0, 0, 1 / weight).astype(weight.dtype)
        store(mean, mean_sum * factor)
        store(variance, variance_sum * factor)

    def batch_norm_forward(self, x: Array, mean: Array, variance: Array, y: Array, *, eps: float) -> None:
        (values,) = widen(x)
        store(y, (values - per_channel(mean, x.ndim)) * _inverse_deviation(variance, eps, x.ndim))

    def batch_norm_backward(self, y: Array, variance: Array, dy: Array, dx: Array, *, eps: float) -> None:
        output, gradient = widen(y, dy)
        count = y.size // y.shape[1]
        mean = (column_sums(rows(gradient)) / count).astype(gradient.dtype)
        product = (column_sums(rows(gradient * output)) / count).astype(gradient.dtype)
        centred = gradient - per_channel(mean, y.ndim) - output * per_channel(product, y.ndim)
        store(dx, centred * _inverse_deviation(variance, eps, y.ndim))

    def batch_norm_backward_global(self, variance: Array, dy: Array, dx: Array, *, eps: float) -> None:
        store(dx, widen(dy)[0] * _inverse_deviation(variance, eps, dy.ndim))

    def batch_norm_scale_forward(self, x: Array, mean: Array, variance: Array, s: Array, b: Array, y: Array, *, eps: float, relu: bool) -> None:
        (values,) = widen(x)
        values = (values - per_channel(mean, x.ndim)) * _inverse_deviation(variance, eps, x.ndim)
        values *= per_channel(s, x.ndim)
        values += per_channel(b, x.ndim)
        store(y, np.maximum(values, 0) if relu else values)

    def batch_norm_scale_backward(
        self,
        x: Array,
        y: Array,
        mean: Array,
        variance: Array,
        s: Array,
        b: Array,
        dy: Array,
        dx: Array,
        ds: Array | None,
        db: Array | None,
        *,
        eps: float,
        relu: bool,
        fixed: bool,
        accumulate_s: bool,
        accumulate_b: bool,
    ) -> None:
        values, gradient = widen(x, dy)
        gradient = rectified(gradient, y if relu else None)
        inverse = _inverse_deviation(variance, eps, x.ndim)
        normalised = (values - per_channel(mean, x.ndim)) * inverse
        total, product = column_sums(rows(gradient)), column_sums(rows(gradient * normalised))
        if not fixed:
            count = x.size // x.shape[1]
            shift, slope = ((sums / count).astype(gradient.dtype) for sums in (total, product))
            gradient = gradient - per_channel(shift, x.ndim) - normalised * per_channel(slope, x.ndim)
        store(dx, gradient * (per_channel(s, x.ndim) * inverse))
        for target, sums, accumulate in ((ds, product, accumulate_s), (db, total, accumulate_b)):
            if target is not None:
                store_gradient(target, sums, accumulate)


def _inverse_deviation(variance: Array, eps: float, axes: int) -> Array:
    (values,) = widen(variance)
    return per_channel(1 / np.sqrt(values + eps), axes)
