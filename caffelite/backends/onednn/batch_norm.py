"""Batch normalisation from given statistics, and its gradient, on oneDNN."""

from __future__ import annotations

import numpy as np

from caffelite.backends.contract import Array
from caffelite.backends.onednn.dnnl import (
    BACKWARD,
    DIFF_DST,
    DIFF_SCALE,
    DIFF_SRC,
    DST,
    FLOAT32,
    MEAN,
    SCALE,
    SRC,
    TRAINING,
    USE_GLOBAL_STATISTICS,
    USE_SCALE,
    VARIANCE,
    Dnnl,
    Primitive,
    Unsupported,
)
from caffelite.backends.onednn.plan import PlanningBackend, Run, describe, is_usual, signature


def plan_forward(dnnl: Dnnl, x: Array, mean: Array, variance: Array, y: Array, eps: float) -> Run:
    """y from given statistics."""
    if not (is_usual(x) and is_usual(y)) or x.dtype != y.dtype:
        raise Unsupported("not blobs of one type")
    if any(z.dtype != FLOAT32 or not z.flags.c_contiguous for z in (mean, variance)):
        raise Unsupported("statistics are not plain float32 vectors")
    numbers = (TRAINING, describe(dnnl, x), describe(dnnl, y), eps, USE_GLOBAL_STATISTICS, dnnl.plain)
    return Primitive(dnnl, dnnl.primitive_descriptor("batch_normalization_forward", *numbers), (SRC, MEAN, VARIANCE, DST))


def plan_backward(dnnl: Dnnl, y: Array, dy: Array, dx: Array) -> Run:
    """dx from the normalised y: oneDNN is told that y is an input of mean 0 and variance 1, and 1/deviation is its scale."""
    if not all(is_usual(z) and z.dtype == y.dtype for z in (y, dy, dx)):
        raise Unsupported("not blobs of one type")
    forward = dnnl.primitive_descriptor("batch_normalization_forward", TRAINING, describe(dnnl, y), describe(dnnl, y), 0.0, USE_SCALE, dnnl.plain)
    blobs = (describe(dnnl, dx), describe(dnnl, dy), describe(dnnl, y))
    descriptor = dnnl.primitive_descriptor("batch_normalization_backward", BACKWARD, *blobs, 0.0, USE_SCALE, forward, dnnl.plain)
    channels = y.shape[1]
    # The scale's own gradient is put out whether it is wanted or not.
    unit = {MEAN: np.zeros(channels, FLOAT32), VARIANCE: np.ones(channels, FLOAT32), DIFF_SCALE: np.zeros(channels, FLOAT32)}
    return Primitive(dnnl, descriptor, (SRC, DIFF_DST, SCALE, DIFF_SRC), unit)


class BatchNormOps(PlanningBackend):
    """Normalising and its gradient; the sums of statistics are NumPy's."""

    def batch_norm_forward(self, x: Array, mean: Array, variance: Array, y: Array, *, eps: float) -> None:
        key = ("batch norm", signature(x), signature(mean), signature(variance), signature(y), eps)
        plan = self.plan(key, lambda: plan_forward(self.dnnl, x, mean, variance, y, eps))
        if plan is None:
            super().batch_norm_forward(x, mean, variance, y, eps=eps)
        else:
            plan(x.ctypes.data, mean.ctypes.data, variance.ctypes.data, y.ctypes.data)

    def batch_norm_backward(self, y: Array, variance: Array, dy: Array, dx: Array, *, eps: float) -> None:
        key = ("batch norm backward", signature(y), signature(dy), signature(dx))
        plan = self.plan(key, lambda: plan_backward(self.dnnl, y, dy, dx))
        if plan is None:
            super().batch_norm_backward(y, variance, dy, dx, eps=eps)
        else:
            inverse = (1 / np.sqrt(variance.astype(FLOAT32) + FLOAT32.type(eps))).astype(FLOAT32)
            plan(y.ctypes.data, dy.ctypes.data, inverse.ctypes.data, dx.ctypes.data)
