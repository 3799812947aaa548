"""Scale and Bias with an operand for each channel on oneDNN; other operands are NumPy's."""

from __future__ import annotations

import numpy as np

from caffelite.backends.contract import Array, is_usual
from caffelite.backends.numpy.common import store_gradient
from caffelite.backends.onednn.channels import ChannelOps, Pieces, is_per_channel, layout
from caffelite.backends.onednn.dnnl import (
    BACKWARD,
    DIFF_DST,
    DIFF_SCALE,
    DIFF_SRC,
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
from caffelite.backends.onednn.matmul import column_sums
from caffelite.backends.onednn.plan import Run, signature, type_of


def plan_factor(dnnl: Dnnl, x: Array, dy: Array, threads: int) -> Run:
    """Sums of dy x into a float64 vector: the scale's gradient of batch normalisation with mean 0 and variance 1."""
    seen, flags = layout(x, dy), USE_GLOBAL_STATISTICS | USE_SCALE
    zero, one = np.zeros(seen.width, FLOAT32), np.ones(seen.width, FLOAT32)

    def make(images: int) -> Primitive:
        blob = seen.describe(dnnl, images)
        forward = dnnl.primitive_descriptor("batch_normalization_forward", TRAINING, blob, blob, 0.0, flags, dnnl.plain)
        descriptor = dnnl.primitive_descriptor("batch_normalization_backward", BACKWARD, blob, blob, blob, 0.0, flags, forward, dnnl.plain)
        # The blob's gradient is put out whether it is wanted or not.
        return Primitive(dnnl, descriptor, (SRC, DIFF_DST, DIFF_SRC, DIFF_SCALE), {MEAN: zero, VARIANCE: one, SCALE: one})

    pieces = Pieces(dnnl, seen, x.itemsize, threads, make, 1)

    def factor(x: int, dy: int, sums: Array) -> None:
        np.sum(pieces(x, dy)[0], axis=0, out=sums)

    return factor


def plan_column_sums(dnnl: Dnnl, dy: Array) -> Run:
    """Sums over all but the channels, which are the last in memory."""
    if dy.ndim not in (2, 4) or not dy.size or not is_usual(dy):
        raise Unsupported("not rows of channels")
    channels = dy.shape[1]
    return column_sums(dnnl, dy.size // channels, channels, type_of(dy), add=False)


class ScaleBiasOps(ChannelOps):
    """Multiplying by and adding a value for each channel, and the gradients."""

    def scale_forward(self, x: Array, s: Array, b: Array | None, y: Array) -> None:
        per_channel = all(is_per_channel(z, x) for z in (s, b) if z is not None)
        if not (per_channel and self._affine(x, y, s, 0.0 if b is None else b)):
            super().scale_forward(x, s, b, y)

    def scale_backward_data(self, dy: Array, s: Array, dx: Array) -> None:
        if not (is_per_channel(s, dy) and self._affine(dy, dx, s, 0.0)):
            super().scale_backward_data(dy, s, dx)

    def scale_backward_factor(self, x: Array, dy: Array, ds: Array, *, accumulate: bool) -> None:
        key = ("scale factor", signature(x), signature(dy))
        plan = self.plan(key, lambda: plan_factor(self.dnnl, x, dy, self.threads)) if is_per_channel(ds, x) else None
        if plan is None:
            super().scale_backward_factor(x, dy, ds, accumulate=accumulate)
        else:
            sums = np.empty(x.shape[1], np.float64)
            plan(x.ctypes.data, dy.ctypes.data, sums)
            store_gradient(ds, sums.reshape(ds.shape), accumulate)

    def bias_forward(self, x: Array, b: Array, y: Array) -> None:
        if not (is_per_channel(b, x) and self._affine(x, y, 1.0, b)):
            super().bias_forward(x, b, y)

    def bias_backward(self, dy: Array, db: Array, *, accumulate: bool) -> None:
        plan = self.plan(("column sums", signature(dy)), lambda: plan_column_sums(self.dnnl, dy)) if is_per_channel(db, dy) else None
        if plan is None:
            super().bias_backward(dy, db, accumulate=accumulate)
        else:
            sums = np.empty(dy.shape[1], FLOAT32)
            plan(dy.ctypes.data, sums.ctypes.data)
            store_gradient(db, sums.reshape(db.shape), accumulate)
