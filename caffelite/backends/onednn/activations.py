"""Elementwise activations: ReLU and PReLU on oneDNN; the others are NumPy's."""

from __future__ import annotations

from math import prod

import numpy as np

from caffelite.backends.contract import Array, is_usual, strides_of
from caffelite.backends.onednn.dnnl import (
    ATTR_SCALES,
    BINARY_MAX,
    DIFF_DST,
    DIFF_SRC,
    DST,
    F32,
    FLOAT32,
    RELU,
    RELU_FROM_DST,
    SRC,
    SRC1,
    TRAINING,
    WEIGHTS,
    Dnnl,
    Primitive,
    Unsupported,
)
from caffelite.backends.onednn.plan import PlanningBackend, Run, describe_flat, signature, type_of


def plan_relu_forward(dnnl: Dnnl, x: Array, y: Array, slope: float) -> Run:
    """Without slope as max(0*x, x), which keeps NaN where oneDNN's ReLU gives 0; -infinity stays, too."""
    source, target = describe_flat(dnnl, x, y)
    if slope:
        eltwise = dnnl.primitive_descriptor("eltwise_forward", TRAINING, RELU, source, target, slope, 0.0, dnnl.plain)
        return Primitive(dnnl, eltwise, (SRC, DST))
    attributes = dnnl.attributes(scales=(SRC,))
    binary = dnnl.primitive_descriptor("binary", BINARY_MAX, source, source, target, attributes)
    run = Primitive(dnnl, binary, (SRC, SRC1, DST), {ATTR_SCALES | SRC: np.zeros(16, np.float32)})
    return lambda x, y: run(x, x, y)


def plan_relu_backward(dnnl: Dnnl, y: Array, dy: Array, dx: Array, slope: float) -> Run:
    data, given, made = describe_flat(dnnl, y, dy, dx)
    hint = dnnl.primitive_descriptor("eltwise_forward", TRAINING, RELU_FROM_DST, data, data, slope, 0.0, dnnl.plain)
    descriptor = dnnl.primitive_descriptor("eltwise_backward", RELU_FROM_DST, made, given, data, slope, 0.0, hint, dnnl.plain)
    return Primitive(dnnl, descriptor, (DST, DIFF_DST, DIFF_SRC))


def plan_prelu_forward(dnnl: Dnnl, x: Array, a: Array, y: Array) -> Run:
    """Channels-last memory as rows of channels, with a row of slopes."""
    if not (is_usual(x) and is_usual(y)) or x.ndim not in (2, 4) or a.ndim != 1 or a.dtype != FLOAT32 or not prod(x.shape):
        raise Unsupported("not rows of channels")
    channels = x.shape[1]
    rows = [dnnl.strided((prod(x.shape) // channels, channels), (channels, 1), type_of(z)) for z in (x, y)]
    slopes = dnnl.strided((1, channels), (channels, a.strides[0] // 4), F32)
    descriptor = dnnl.primitive_descriptor("prelu_forward", TRAINING, rows[0], slopes, rows[1], dnnl.plain)
    return Primitive(dnnl, descriptor, (SRC, WEIGHTS, DST))


class ActivationOps(PlanningBackend):
    """ReLU, and PReLU's forward pass."""

    def relu_forward(self, x: Array, y: Array, *, slope: float) -> None:
        plan = self.plan(("relu forward", signature(x), signature(y), slope), lambda: plan_relu_forward(self.dnnl, x, y, slope))
        if plan is None:
            super().relu_forward(x, y, slope=slope)
        else:
            plan(x.ctypes.data, y.ctypes.data)

    def relu_backward(self, y: Array, dy: Array, dx: Array, *, slope: float) -> None:
        key = ("relu backward", signature(y), signature(dy), signature(dx), slope)
        plan = self.plan(key, lambda: plan_relu_backward(self.dnnl, y, dy, dx, slope))
        if plan is None:
            super().relu_backward(y, dy, dx, slope=slope)
        else:
            plan(y.ctypes.data, dy.ctypes.data, dx.ctypes.data)

    def _rectify(self, dx: Array, positive: Array | None) -> None:
        """Takes dx on through the ReLU that put out `positive`: no primitive that computes a gradient does it on the way."""
        if positive is not None:
            self.relu_backward(positive, dx, dx, slope=0.0)

    def _rectified(self, dy: Array, positive: Array) -> Array:
        """A copy of dy, in scratch memory, taken on through the ReLU that put out `positive`."""
        held = self.dnnl.scratch.array("rectified", dy.size, dy.dtype)
        copy = np.ndarray(dy.shape, dy.dtype, held, 0, strides_of(dy.shape, dy.itemsize))
        self.relu_backward(positive, dy, copy, slope=0.0)
        return copy

    def prelu_forward(self, x: Array, a: Array, y: Array) -> None:
        plan = self.plan(("prelu forward", signature(x), signature(a), signature(y)), lambda: plan_prelu_forward(self.dnnl, x, a, y))
        if plan is None:
            super().prelu_forward(x, a, y)
        else:
            plan(x.ctypes.data, a.ctypes.data, y.ctypes.data)
