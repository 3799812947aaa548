"""Sums of arrays (Eltwise SUM, and Split's gradient) on flat memory."""

from __future__ import annotations

from collections.abc import Sequence

from caffelite.backends.contract import Array
from caffelite.backends.onednn.activations import ActivationOps
from caffelite.backends.onednn.dnnl import Dnnl, Unsupported
from caffelite.backends.onednn.plan import Run, describe_flat, signature


def plan_sum(dnnl: Dnnl, xs: Sequence[Array], y: Array, coeffs: Sequence[float]) -> Run:
    *sources, target = describe_flat(dnnl, *xs, y)
    if len({x.dtype for x in (*xs, y)}) > 1:
        raise Unsupported("types differ")
    return dnnl.sum(target, sources, coeffs)


class EltwiseOps(ActivationOps):
    """Sums; products and maxima are NumPy's."""

    def eltwise_sum(self, xs: Sequence[Array], y: Array, coeffs: Sequence[float], positive: Array | None = None, *, relu: bool = False) -> None:
        key = ("eltwise sum", tuple(signature(x) for x in xs), signature(y), tuple(coeffs))
        plan = self.plan(key, lambda: plan_sum(self.dnnl, xs, y, coeffs))
        if plan is None:
            super().eltwise_sum(xs, y, coeffs, positive, relu=relu)
            return
        plan(*(x.ctypes.data for x in xs), y.ctypes.data)
        if relu:
            self.relu_forward(y, y, slope=0.0)
        self._rectify(y, positive)
