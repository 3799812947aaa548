"""Batch normalisation from given statistics on oneDNN."""

from __future__ import annotations

from caffelite.backends.contract import Array
from caffelite.backends.onednn.dnnl import DST, FLOAT32, MEAN, SRC, TRAINING, USE_GLOBAL_STATISTICS, VARIANCE, Dnnl, Primitive, Unsupported
from caffelite.backends.onednn.plan import PlanningBackend, Run, describe, is_usual, signature


def plan_forward(dnnl: Dnnl, x: Array, mean: Array, variance: Array, y: Array, eps: float) -> Run:
    """y from given statistics."""
    if not (is_usual(x) and is_usual(y)) or x.dtype != y.dtype:
        raise Unsupported("not blobs of one type")
    if any(z.dtype != FLOAT32 or not z.flags.c_contiguous for z in (mean, variance)):
        raise Unsupported("statistics are not plain float32 vectors")
    numbers = (TRAINING, describe(dnnl, x), describe(dnnl, y), eps, USE_GLOBAL_STATISTICS, dnnl.plain)
    return Primitive(dnnl, dnnl.primitive_descriptor("batch_normalization_forward", *numbers), (SRC, MEAN, VARIANCE, DST))


class BatchNormOps(PlanningBackend):
    """Normalising; the sums of statistics and gradients are NumPy's."""

    def batch_norm_forward(self, x: Array, mean: Array, variance: Array, y: Array, *, eps: float) -> None:
        key = ("batch norm", signature(x), signature(mean), signature(variance), signature(y), eps)
        plan = self.plan(key, lambda: plan_forward(self.dnnl, x, mean, variance, y, eps))
        if plan is None:
            super().batch_norm_forward(x, mean, variance, y, eps=eps)
        else:
            plan(x.ctypes.data, mean.ctypes.data, variance.ctypes.data, y.ctypes.data)
