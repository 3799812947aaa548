"""Convolution on oneDNN: channels-last activations as they lie, weights brought into the layout each primitive likes best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from caffelite import environment
from caffelite.backends.contract import Array, Drop, Ints, is_usual
from caffelite.backends.onednn import convolution_winograd as winograd
from caffelite.backends.onednn.convolution_geometry import Geometry
from caffelite.backends.onednn.convolution_weights import plan_backward_weights
from caffelite.backends.onednn.dnnl import (
    BIAS,
    CONVOLUTION_DIRECT,
    DIFF_DST,
    DIFF_SRC,
    DST,
    F32,
    RELU_SLOPE,
    SRC,
    WEIGHTS,
    Primitive,
    Unsupported,
)
from caffelite.backends.onednn.dropout import DropoutOps
from caffelite.backends.onednn.matmul import prepared
from caffelite.backends.onednn.memory import AMX
from caffelite.backends.onednn.plan import Drain, Feed, Run, address, describe, signature, type_of
from caffelite.backends.onednn.winograd_terms import Shape

IMAGE_CHANNELS = 4  # at most so many channels are an image's: see PlanningBackend.small_products


def plan_forward(g: Geometry, x: Array, w: Array, b: Array | None, y: Array, relu: bool) -> Run:
    dnnl = g.dnnl
    descriptor = g.forward(g.activation(x), g.activation(y), bias=b is not None, relu=relu)
    feed_x = Feed(dnnl, describe(dnnl, x), dnnl.argument(descriptor, SRC), "input")
    feed_w = Feed(dnnl, g.weights(type_of(w)), dnnl.argument(descriptor, WEIGHTS), "weights")
    drain = Drain(dnnl, dnnl.argument(descriptor, DST), describe(dnnl, y), "output")
    feed_b = None if b is None else Feed(dnnl, describe(dnnl, b), g.bias(), "bias")
    run = Primitive(dnnl, descriptor, (SRC, WEIGHTS, DST) if feed_b is None else (SRC, WEIGHTS, DST, BIAS), RELU_SLOPE if relu else None)

    def forward(x: int, w: int, b: int, y: int) -> None:
        bias = () if feed_b is None else (feed_b(b),)
        run(feed_x(x), feed_w(w), drain.target(y), *bias)
        drain.finish(y)

    return forward


def plan_pointwise(g: Geometry, x: Array, w: Array, b: Array | None, y: Array, relu: bool) -> Run:
    """1x1 in float32: y = x w^T over all positions. 73728 x 192 by 192 x 160 took 23 ms, the convolution primitive 29 (2 Zen 4 cores)."""
    dnnl, inputs, outputs = g.dnnl, x.shape[1], y.shape[1]
    rows = x.size // inputs
    left, made = dnnl.strided((rows, inputs), (inputs, 1), F32), dnnl.strided((rows, outputs), (outputs, 1), F32)
    row = None if b is None else dnnl.strided((1, outputs), (outputs, 1), F32)
    multiply, right = prepared(dnnl, left, dnnl.any((inputs, outputs), F32), row, made, relu=relu)
    feed_w = Feed(dnnl, dnnl.strided((inputs, outputs), (1, inputs), F32), right, "weights")

    def forward(x: int, w: int, b: int, y: int) -> None:
        bias = () if row is None else (b,)
        multiply(x, feed_w(w), *bias, y)

    return forward


def plan_backward_data(g: Geometry, dy: Array, w: Array, dx: Array) -> Run:
    dnnl = g.dnnl
    dx_made, dy_wanted = g.activation(dx), g.activation(dy)
    hint = g.forward(dx_made, dy_wanted, bias=False)
    weights = dnnl.any(g.w_shape, g.type)
    descriptor = dnnl.primitive_descriptor("convolution_backward_data", CONVOLUTION_DIRECT, dx_made, weights, dy_wanted, *g.steps, hint, dnnl.plain)
    feed_dy = Feed(dnnl, describe(dnnl, dy), dnnl.argument(descriptor, DIFF_DST), "input")
    feed_w = Feed(dnnl, g.weights(type_of(w)), dnnl.argument(descriptor, WEIGHTS), "weights")
    drain = Drain(dnnl, dnnl.argument(descriptor, DIFF_SRC), describe(dnnl, dx), "output")
    run = Primitive(dnnl, descriptor, (DIFF_DST, WEIGHTS, DIFF_SRC))

    def backward_data(dy: int, w: int, dx: int) -> None:
        run(feed_dy(dy), feed_w(w), drain.target(dx))
        drain.finish(dx)

    return backward_data


class ConvolutionOps(DropoutOps):
    """Convolution forward and backward."""

    def _filtered(self, plan: Callable[[Shape], Run], x: Array, w: Array, y: Array, *geometry: Any) -> Run | None:
        """The plan by Winograd's filters where that is quicker; None where plain products are, or are asked for."""
        try:
            s = winograd.shape_of(x, w, y, *geometry)
            return plan(s) if winograd.pays(s) and self._may_filter(type_of(x)) else None
        except Unsupported:
            return None

    def _may_filter(self, dtype: int) -> bool:
        """AMX multiplies in bfloat16 so much quicker than in float32 that nothing is saved."""
        amx = self.dnnl.instruction_set() & AMX == AMX
        return environment.choice(environment.WINOGRAD, ("1", "0")) == "1" and (dtype == F32 or not amx)

    def convolution_forward(
        self,
        x: Array,
        w: Array,
        b: Array | None,
        y: Array,
        *,
        stride: Ints,
        pad: Ints,
        dilation: Ints,
        group: int,
        relu: bool = False,
        drop: Drop | None = None,
        tf32: bool = False,
    ) -> None:
        key = ("convolution forward", signature(x), signature(w), None if b is None else signature(b), signature(y), stride, pad, dilation, group, relu)

        def build() -> Run:
            if group == 1 and w.shape[1] <= IMAGE_CHANNELS:
                self.leave_small(y.size * w[0].size, x, w, y)
            filtered = self._filtered(lambda s: winograd.plan_forward(self.dnnl, s, x, w, b, relu), x, w, y, stride, pad, dilation, group)
            if filtered is not None:
                return filtered
            g = Geometry(self.dnnl, x, w, y, stride, pad, dilation, group)
            pointwise = g.type == F32 and g.pointwise and all(is_usual(z) for z in (x, w, y))
            return (plan_pointwise if pointwise else plan_forward)(g, x, w, b, y, relu)

        plan = self.plan(key, build)
        if plan is None:
            super().convolution_forward(x, w, b, y, stride=stride, pad=pad, dilation=dilation, group=group, relu=relu)
        else:
            plan(x.ctypes.data, w.ctypes.data, address(b), y.ctypes.data)
        self._drop(y, drop)

    def convolution_backward_data(
        self,
        dy: Array,
        w: Array,
        dx: Array,
        positive: Array | None = None,
        *,
        stride: Ints,
        pad: Ints,
        dilation: Ints,
        group: int,
        ratio: float | None = None,
        tf32: bool = False,
    ) -> None:
        key = ("convolution backward data", signature(dy), signature(w), signature(dx), stride, pad, dilation, group)

        def build() -> Run:
            filtered = self._filtered(lambda s: winograd.plan_backward_data(self.dnnl, s, dy, w), dx, w, dy, stride, pad, dilation, group)
            return filtered or plan_backward_data(Geometry(self.dnnl, dx, w, dy, stride, pad, dilation, group), dy, w, dx)

        plan = self.plan(key, build)
        if plan is None:
            super().convolution_backward_data(dy, w, dx, positive, stride=stride, pad=pad, dilation=dilation, group=group, ratio=ratio)
        else:
            plan(dy.ctypes.data, w.ctypes.data, dx.ctypes.data)
            self._take_on(dx, positive, ratio)

    def convolution_backward_weights(
        self,
        x: Array,
        dy: Array,
        dw: Array | None,
        db: Array | None,
        *,
        stride: Ints,
        pad: Ints,
        dilation: Ints,
        group: int,
        accumulate_w: bool,
        accumulate_b: bool,
        tf32: bool = False,
    ) -> None:
        numbers = (stride, pad, dilation, group, accumulate_w, accumulate_b)
        key = ("convolution backward weights", signature(x), signature(dy), None if dw is None else signature(dw), db is None, *numbers)

        def build() -> Run:
            assert dw is not None
            if group == 1 and dw.shape[1] <= IMAGE_CHANNELS:
                self.leave_small(dy.size * dw[0].size, x, dy)
            how = db is not None, accumulate_w, accumulate_b
            filtered = self._filtered(lambda s: winograd.plan_backward_weights(self.dnnl, s, x, *how), x, dw, dy, stride, pad, dilation, group)
            if filtered is not None:
                return filtered
            g = Geometry(self.dnnl, x, dw, dy, stride, pad, dilation, group)
            return plan_backward_weights(g, x, dy, dw, db, accumulate_w, accumulate_b, self.threads)

        plan = None if dw is None else self.plan(key, build)
        if plan is None:
            super().convolution_backward_weights(
                x, dy, dw, db, stride=stride, pad=pad, dilation=dilation, group=group, accumulate_w=accumulate_w, accumulate_b=accumulate_b
            )
        else:
            plan(x.ctypes.data, dy.ctypes.data, address(dw), address(db))
