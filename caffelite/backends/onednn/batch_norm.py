"""Batch normalisation on oneDNN: statistics, the normalised values, and the gradient."""

from __future__ import annotations

import numpy as np

from caffelite.backends.contract import Array, is_usual
from caffelite.backends.numpy.common import store, store_gradient
from caffelite.backends.onednn.channels import ChannelOps, Pieces, layout, vector
from caffelite.backends.onednn.dnnl import (
    BACKWARD,
    DIFF_DST,
    DIFF_SCALE,
    DIFF_SHIFT,
    DIFF_SRC,
    DST,
    FLOAT32,
    INFERENCE,
    MEAN,
    SCALE,
    SHIFT,
    SRC,
    TRAINING,
    USE_GLOBAL_STATISTICS,
    USE_SCALE,
    USE_SHIFT,
    VARIANCE,
    Dnnl,
    Primitive,
    Unsupported,
)
from caffelite.backends.onednn.plan import Run, describe, signature


def plan_statistics(dnnl: Dnnl, x: Array, threads: int) -> Run:
    """Mean and variance, each in two passes over a piece and its parts combined in float64. The normalised values are dropped."""
    seen = layout(x)

    def make(images: int) -> Primitive:
        blob = seen.describe(dnnl, images)
        descriptor = dnnl.primitive_descriptor("batch_normalization_forward", TRAINING, blob, blob, 1.0, 0, dnnl.plain)
        return Primitive(dnnl, descriptor, (SRC, DST, MEAN, VARIANCE))

    pieces = Pieces(dnnl, seen, x.itemsize, threads, make, 2)

    def statistics(x: int, mean: Array, variance: Array) -> None:
        means, variances = pieces(x)
        centre = pieces.weights @ means
        store(mean, centre)
        store(variance, pieces.weights @ (variances + (means - centre) ** 2))

    return statistics


def plan_forward(dnnl: Dnnl, x: Array, y: Array, eps: float) -> Run:
    """y from given statistics."""
    seen = layout(x, y)
    blob = seen.describe(dnnl)
    descriptor = dnnl.primitive_descriptor("batch_normalization_forward", TRAINING, blob, blob, eps, USE_GLOBAL_STATISTICS, dnnl.plain)
    run = Primitive(dnnl, descriptor, (SRC, MEAN, VARIANCE, DST))

    def forward(x: int, mean: Array, variance: Array, y: int) -> None:
        mean, variance = vector(mean, seen.fold), vector(variance, seen.fold)
        run(x, mean.ctypes.data, variance.ctypes.data, y)

    return forward


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


def plan_scale_forward(dnnl: Dnnl, x: Array, y: Array, eps: float) -> Run:
    """y from given statistics, with scale and shift."""
    seen, flags = layout(x, y), USE_GLOBAL_STATISTICS | USE_SCALE | USE_SHIFT
    blob = seen.describe(dnnl)
    descriptor = dnnl.primitive_descriptor("batch_normalization_forward", INFERENCE, blob, blob, eps, flags, dnnl.plain)
    run = Primitive(dnnl, descriptor, (SRC, MEAN, VARIANCE, SCALE, SHIFT, DST))

    def forward(x: int, y: int, *given: Array) -> None:
        vectors = [vector(z, seen.fold) for z in given]
        run(x, *(z.ctypes.data for z in vectors), y)

    return forward


def plan_scale_backward(dnnl: Dnnl, x: Array, dx: Array, eps: float, fixed: bool) -> Run:
    """dx in place of the gradient of the output, and the gradients of scale and shift."""
    if not all(is_usual(z) and z.dtype == x.dtype for z in (x, dx)):
        raise Unsupported("not blobs of one type")
    flags = USE_SCALE | USE_SHIFT | (USE_GLOBAL_STATISTICS if fixed else 0)
    blobs = (describe(dnnl, dx), describe(dnnl, dx), describe(dnnl, x))
    forward = dnnl.primitive_descriptor("batch_normalization_forward", TRAINING, blobs[2], blobs[2], eps, flags, dnnl.plain)
    descriptor = dnnl.primitive_descriptor("batch_normalization_backward", BACKWARD, *blobs, eps, flags, forward, dnnl.plain)
    run = Primitive(dnnl, descriptor, (SRC, MEAN, VARIANCE, SCALE, DIFF_DST, DIFF_SRC, DIFF_SCALE, DIFF_SHIFT))

    def backward(x: int, dx: int, mean: Array, variance: Array, s: Array, sums: Array) -> None:
        given = [vector(z) for z in (mean, variance, s)]
        run(x, *(z.ctypes.data for z in given), dx, dx, *(row.ctypes.data for row in sums))

    return backward


def inverse_deviation(variance: Array, eps: float) -> Array:
    return (1 / np.sqrt(variance.astype(FLOAT32) + FLOAT32.type(eps))).astype(FLOAT32)


class BatchNormOps(ChannelOps):
    """Statistics, normalising and its gradient."""

    def batch_norm_statistics(self, x: Array, mean: Array, variance: Array) -> None:
        plan = self.plan(("batch norm statistics", signature(x)), lambda: plan_statistics(self.dnnl, x, self.threads))
        if plan is None:
            super().batch_norm_statistics(x, mean, variance)
        else:
            plan(x.ctypes.data, mean, variance)

    def batch_norm_forward(self, x: Array, mean: Array, variance: Array, y: Array, *, eps: float) -> None:
        plan = self.plan(("batch norm", signature(x), signature(y), eps), lambda: plan_forward(self.dnnl, x, y, eps))
        if plan is None:
            super().batch_norm_forward(x, mean, variance, y, eps=eps)
        else:
            plan(x.ctypes.data, mean, variance, y.ctypes.data)

    def batch_norm_backward(self, y: Array, variance: Array, dy: Array, dx: Array, *, eps: float) -> None:
        key = ("batch norm backward", signature(y), signature(dy), signature(dx))
        plan = self.plan(key, lambda: plan_backward(self.dnnl, y, dy, dx))
        if plan is None:
            super().batch_norm_backward(y, variance, dy, dx, eps=eps)
        else:
            inverse = inverse_deviation(variance, eps)
            plan(y.ctypes.data, dy.ctypes.data, inverse.ctypes.data, dx.ctypes.data)

    def batch_norm_scale_forward(self, x: Array, mean: Array, variance: Array, s: Array, b: Array, y: Array, *, eps: float, relu: bool) -> None:
        plan = self.plan(("batch norm scale", signature(x), signature(y), eps), lambda: plan_scale_forward(self.dnnl, x, y, eps))
        if plan is None:
            super().batch_norm_scale_forward(x, mean, variance, s, b, y, eps=eps, relu=relu)
            return
        plan(x.ctypes.data, y.ctypes.data, mean, variance, s, b)
        if relu:  # on its own: the primitive's ReLU turns NaN into 0 and would hide a diverged net
            self.relu_forward(y, y, slope=0.0)

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
        key = ("batch norm scale backward", signature(x), signature(dx), eps, fixed)
        plan = self.plan(key, lambda: plan_scale_backward(self.dnnl, x, dx, eps, fixed))
        if plan is None:
            adds = {"accumulate_s": accumulate_s, "accumulate_b": accumulate_b}
            super().batch_norm_scale_backward(x, y, mean, variance, s, b, dy, dx, ds, db, eps=eps, relu=relu, fixed=fixed, **adds)
            return
        if relu:
            self.relu_backward(y, dy, dx, slope=0.0)
        elif dx is not dy:
            self.copy(dy, dx)
        sums = np.empty((2, x.shape[1]), FLOAT32)
        plan(x.ctypes.data, dx.ctypes.data, mean, variance, s, sums)
        for target, found, accumulate in ((ds, sums[0], accumulate_s), (db, sums[1], accumulate_b)):
            if target is not None:
                store_gradient(target, found, accumulate)

    def batch_norm_backward_global(self, variance: Array, dy: Array, dx: Array, *, eps: float) -> None:
        if not self._affine(dy, dx, inverse_deviation(variance, eps), 0.0):
            super().batch_norm_backward_global(variance, dy, dx, eps=eps)
