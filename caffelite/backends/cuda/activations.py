"""Elementwise activations: ReLU, ELU, Sigmoid, TanH, Power, PReLU; kernels/activations.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from caffelite.backends.contract import Array, Ints
from caffelite.backends.cuda.broadcast import as_struct, reduce, runs_of, sums
from caffelite.backends.cuda.common import THREADS, Base, blocks, cname
from caffelite.backends.cuda.elementwise import vectors
from caffelite.backends.cuda.launch import Module, typed

UNARY = [f"{name}_{way}" for name in ("relu", "elu", "sigmoid", "tanh", "power") for way in ("forward", "backward")]
ACTIVATIONS = Module(
    "activations",
    [
        *typed(*UNARY, "power_constant", "power_backward_line"),
        *typed("prelu_forward", "prelu_backward_data", arguments=2),
        *sums("SlopeTerm"),
    ],
)


class Activations(Base):
    def relu_forward(self, x: Array, y: Array, *, slope: float) -> None:
        _each(self, "relu_forward", x, y, np.float32(slope))

    def relu_backward(self, y: Array, dy: Array, dx: Array, *, slope: float) -> None:
        _each(self, "relu_backward", y, dy, dx, np.float32(slope))

    def elu_forward(self, x: Array, y: Array, *, alpha: float) -> None:
        _each(self, "elu_forward", x, y, np.float32(alpha))

    def elu_backward(self, y: Array, dy: Array, dx: Array, *, alpha: float) -> None:
        _each(self, "elu_backward", y, dy, dx, np.float32(alpha))

    def sigmoid_forward(self, x: Array, y: Array) -> None:
        _each(self, "sigmoid_forward", x, y)

    def sigmoid_backward(self, y: Array, dy: Array, dx: Array) -> None:
        _each(self, "sigmoid_backward", y, dy, dx)

    def tanh_forward(self, x: Array, y: Array) -> None:
        _each(self, "tanh_forward", x, y)

    def tanh_backward(self, y: Array, dy: Array, dx: Array) -> None:
        _each(self, "tanh_backward", y, dy, dx)

    def power_forward(self, x: Array, y: Array, *, power: float, scale: float, shift: float) -> None:
        if power * scale == 0:
            _each(self, "power_constant", y, _constant(power, shift))
        else:
            _each(self, "power_forward", x, y, np.float32(power), np.float32(scale), np.float32(shift))

    def power_backward(self, x: Array, y: Array, dy: Array, dx: Array, *, power: float, scale: float, shift: float) -> None:
        factor = power * scale
        if factor == 0:
            _each(self, "power_constant", dx, np.float32(0))
        elif power == 1:
            _each(self, "power_backward_line", x, dy, dx, np.float32(factor), np.float32(0))
        elif power == 2:
            _each(self, "power_backward_line", x, dy, dx, np.float32(factor * shift), np.float32(factor * scale))
        elif shift == 0:
            _each(self, "power_backward", x, y, dy, dx, np.float32(power), np.float32(1), np.float32(-0.0))  # -0 + x is x, zeros too
        else:
            _each(self, "power_backward", x, y, dy, dx, np.float32(factor), np.float32(scale), np.float32(shift))

    def prelu_forward(self, x: Array, a: Array, y: Array) -> None:
        _each(self, "prelu_forward", x, a, y, as_struct(_runs(x, a)), types=f"{cname(x)}, {cname(a)}")

    def prelu_backward_data(self, x: Array, a: Array, dy: Array, dx: Array) -> None:
        _each(self, "prelu_backward_data", x, a, dy, dx, as_struct(_runs(x, a)), types=f"{cname(x)}, {cname(a)}")

    def prelu_backward_slope(self, x: Array, dy: Array, da: Array, *, accumulate: bool) -> None:
        reduce(self, ACTIVATIONS, "SlopeTerm", x, dy, da, _runs(x, da), accumulate)


def _each(ops: Base, kernel: str, first: Array, *others: Any, types: str = "") -> None:
    """Runs a kernel whose threads take 16 bytes of the first array each; its last parameter is the number of elements."""
    ops.launch(ACTIVATIONS, f"{kernel}<{types or cname(first)}>", blocks(vectors(first)), THREADS, first, *others, np.int64(first.size))


def _constant(power: float, shift: float) -> np.float32:
    """shift^power with C's results: 0^-1 is infinite, and a root of a negative number NaN."""
    with np.errstate(all="ignore"):
        return np.float32(1 if power == 0 else np.power(np.float64(shift), power))


def _runs(x: Array, a: Array) -> Ints:
    """How slopes of the channels (or one for all, without axes) lie along x."""
    channels = a.shape[0] if a.ndim else 1
    return runs_of(x.shape, tuple(channels if axis == 1 else 1 for axis in range(x.ndim)))
