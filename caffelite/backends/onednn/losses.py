"""Softmax on oneDNN; the losses around it are small and NumPy's."""

from __future__ import annotations

from caffelite.backends.contract import Array
from caffelite.backends.onednn.dnnl import DIFF_DST, DIFF_SRC, DST, FLOAT32, INFERENCE, SOFTMAX_ACCURATE, SRC, TRAINING, Dnnl, Primitive, Unsupported
from caffelite.backends.onednn.plan import PlanningBackend, Run, describe, signature


def plan_forward(dnnl: Dnnl, x: Array, y: Array, axis: int) -> Run:
    if y.dtype != FLOAT32:
        raise Unsupported("bfloat16 tops would hold exp(x) rounded before the division")
    descriptor = dnnl.primitive_descriptor("softmax_forward", INFERENCE, SOFTMAX_ACCURATE, describe(dnnl, x), describe(dnnl, y), axis, dnnl.plain)
    return Primitive(dnnl, descriptor, (SRC, DST))


def plan_backward(dnnl: Dnnl, y: Array, dy: Array, dx: Array, axis: int) -> Run:
    top, given, made = (describe(dnnl, z) for z in (y, dy, dx))
    hint = dnnl.primitive_descriptor("softmax_forward", TRAINING, SOFTMAX_ACCURATE, top, top, axis, dnnl.plain)
    descriptor = dnnl.primitive_descriptor("softmax_backward", SOFTMAX_ACCURATE, made, given, top, axis, hint, dnnl.plain)
    return Primitive(dnnl, descriptor, (DST, DIFF_DST, DIFF_SRC))


class LossOps(PlanningBackend):
    """Softmax forward and backward."""

    def softmax_forward(self, x: Array, y: Array, *, axis: int) -> None:
        plan = self.plan(("softmax forward", signature(x), signature(y), axis), lambda: plan_forward(self.dnnl, x, y, axis % x.ndim))
        if plan is None:
            super().softmax_forward(x, y, axis=axis)
        else:
            plan(x.ctypes.data, y.ctypes.data)

    def softmax_backward(self, y: Array, dy: Array, dx: Array, *, axis: int) -> None:
        key = ("softmax backward", signature(y), signature(dy), signature(dx), axis)
        plan = self.plan(key, lambda: plan_backward(self.dnnl, y, dy, dx, axis % y.ndim))
        if plan is None:
            super().softmax_backward(y, dy, dx, axis=axis)
        else:
            plan(y.ctypes.data, dy.ctypes.data, dx.ctypes.data)
