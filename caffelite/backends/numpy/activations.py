"""Elementwise activations: ReLU, ELU, Sigmoid, TanH, Power, PReLU."""

from __future__ import annotations

import numpy as np

from caffelite.backends.contract import Array
from caffelite.backends.numpy.common import Base, column_sums, per_channel, rows, store, store_gradient, widen, work_type


class Activations(Base):
    def relu_forward(self, x: Array, y: Array, *, slope: float) -> None:
        (values,) = widen(x)
        positive = np.maximum(values, 0)
        if slope:
            positive += slope * np.minimum(values, 0)
        store(y, positive)

    def relu_backward(self, y: Array, dy: Array, dx: Array, *, slope: float) -> None:
        (gradient,) = widen(dy)
        store(dx, gradient * np.where(y > 0, gradient.dtype.type(1), gradient.dtype.type(slope)))

    def elu_forward(self, x: Array, y: Array, *, alpha: float) -> None:
        (values,) = widen(x)
        store(y, np.where(values > 0, values, alpha * np.expm1(np.minimum(values, 0))))

    def elu_backward(self, y: Array, dy: Array, dx: Array, *, alpha: float) -> None:
        output, gradient = widen(y, dy)
        store(dx, np.where(output > 0, gradient, gradient * (alpha + output)))

    def sigmoid_forward(self, x: Array, y: Array) -> None:
        (values,) = widen(x)
        store(y, 0.5 * np.tanh(0.5 * values) + 0.5)

    def sigmoid_backward(self, y: Array, dy: Array, dx: Array) -> None:
        output, gradient = widen(y, dy)
        store(dx, gradient * (output * (1 - output)))

    def tanh_forward(self, x: Array, y: Array) -> None:
        store(y, np.tanh(widen(x)[0]))

    def tanh_backward(self, y: Array, dy: Array, dx: Array) -> None:
        output, gradient = widen(y, dy)
        store(dx, gradient * (1 - output * output))

    def power_forward(self, x: Array, y: Array, *, power: float, scale: float, shift: float) -> None:
        if power * scale == 0:
            y.fill(1.0 if power == 0 else float(np.power(np.float64(shift), power)))
            return
        base = shift + scale * widen(x)[0]
        store(y, base if power == 1 else base**power)

    def power_backward(self, x: Array, y: Array, dy: Array, dx: Array, *, power: float, scale: float, shift: float) -> None:
        values, output, gradient = widen(x, y, dy)
        if power * scale == 0:
            dx.fill(0)
        elif power == 1:
            store(dx, power * scale * gradient)
        elif power == 2:
            store(dx, gradient * (power * scale * shift + power * scale * scale * values))
        elif shift == 0:
            store(dx, gradient * (power * output / values))
        else:
            store(dx, gradient * (power * scale * output / (shift + scale * values)))

    def prelu_forward(self, x: Array, a: Array, y: Array) -> None:
        values, slope = widen(x, a)
        store(y, np.maximum(values, 0) + per_channel(slope, x.ndim) * np.minimum(values, 0))

    def prelu_backward_data(self, x: Array, a: Array, dy: Array, dx: Array) -> None:
        gradient, slope = widen(dy, a)
        store(dx, np.where(x > 0, gradient, per_channel(slope, x.ndim) * gradient))

    def prelu_backward_slope(self, x: Array, dy: Array, da: Array, *, accumulate: bool) -> None:
        values, gradient = widen(x, dy)
        product = np.where(values <= 0, values * gradient, work_type(values).type(0))
        sums = column_sums(rows(product))
        store_gradient(da, sums if da.ndim else sums.sum(), accumulate)
