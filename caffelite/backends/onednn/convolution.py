"""Convolution on oneDNN: channels-last activations as they lie, weights brought into the layout each primitive likes best."""

from __future__ import annotations

from caffelite.backends.contract import Array, Ints
from caffelite.backends.onednn.dnnl import (
    BIAS,
    CONVOLUTION_DIRECT,
    DIFF_BIAS,
    DIFF_DST,
    DIFF_SRC,
    DIFF_WEIGHTS,
    DST,
    F32,
    RELU_POST_OP,
    RELU_SLOPE,
    SRC,
    TRAINING,
    WEIGHTS,
    Descriptor,
    Dnnl,
    Primitive,
    PrimitiveDescriptor,
)
from caffelite.backends.onednn.plan import Drain, Feed, PlanningBackend, Run, address, compute_type, describe, element_strides, signature, type_of


class Geometry:
    """What the three primitives of one convolution share: descriptors, padding, and the forward one as a hint."""

    def __init__(self, dnnl: Dnnl, x: Array, w: Array, y: Array, stride: Ints, pad: Ints, dilation: Ints, group: int) -> None:
        self.dnnl, self.group, self.type = dnnl, group, compute_type(x, y)
        self.w_shape, self.w_strides = w.shape, element_strides(w)
        if group > 1:
            o, i = w.shape[0] // group, w.shape[1]
            self.w_shape = (group, o, i, *w.shape[2:])
            self.w_strides = (self.w_strides[0] * o, *self.w_strides)
        spans = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], dilation)]
        # What the last window needs beyond the image; negative where the stride leaves cells unread.
        after = tuple((p_out - 1) * s + span - size - p for p_out, s, span, size, p in zip(y.shape[2:], stride, spans, x.shape[2:], pad))
        self.steps = (tuple(stride), tuple(d - 1 for d in dilation), tuple(pad), after)
        self.x_shape, self.y_shape = x.shape, y.shape

    def activation(self, x: Array, dtype: int | None = None) -> Descriptor:
        """x's layout with the compute type."""
        return self.dnnl.strided(x.shape, element_strides(x), dtype or self.type)

    def weights(self, dtype: int) -> Descriptor:
        """w as it lies."""
        return self.dnnl.strided(self.w_shape, self.w_strides, dtype)

    def bias(self, dtype: int = F32) -> Descriptor:
        return self.dnnl.strided((self.y_shape[1],), (1,), dtype)

    def forward(self, x: Descriptor, y: Descriptor, *, bias: bool, relu: bool = False) -> PrimitiveDescriptor:
        dnnl = self.dnnl
        attributes = dnnl.attributes(RELU_POST_OP) if relu else dnnl.plain
        w = dnnl.any(self.w_shape, self.type)
        b = self.bias() if bias else None
        return dnnl.primitive_descriptor("convolution_forward", TRAINING, CONVOLUTION_DIRECT, x, w, b, y, *self.steps, attributes)


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


def plan_backward_weights(g: Geometry, x: Array, dy: Array, db: Array | None, add_w: bool, add_b: bool) -> Run:
    """A plan over the addresses of x, dy, dw and db (ignored without db)."""
    dnnl = g.dnnl
    x_wanted, dy_wanted = g.activation(x), g.activation(dy)
    hint = g.forward(x_wanted, dy_wanted, bias=db is not None)
    made_b = None if db is None else g.bias()
    # Gradients leave in float32 whatever the operands are.
    made_w = dnnl.any(g.w_shape, F32)
    descriptor = dnnl.primitive_descriptor("convolution_backward_weights", CONVOLUTION_DIRECT, x_wanted, made_w, made_b, dy_wanted, *g.steps, hint, dnnl.plain)
    feed_x = Feed(dnnl, describe(dnnl, x), dnnl.argument(descriptor, SRC), "input")
    feed_dy = Feed(dnnl, describe(dnnl, dy), dnnl.argument(descriptor, DIFF_DST), "second input")
    drain_w = Drain(dnnl, dnnl.argument(descriptor, DIFF_WEIGHTS), g.weights(F32), "weights", add=add_w)
    drain_b = None if made_b is None else Drain(dnnl, made_b, made_b, "bias", add=add_b)
    run = Primitive(dnnl, descriptor, (SRC, DIFF_DST, DIFF_WEIGHTS) if drain_b is None else (SRC, DIFF_DST, DIFF_WEIGHTS, DIFF_BIAS))

    def backward_weights(x: int, dy: int, dw: int, db: int) -> None:
        bias = () if drain_b is None else (drain_b.target(db),)
        run(feed_x(x), feed_dy(dy), drain_w.target(dw), *bias)
        drain_w.finish(dw)
        if drain_b is not None:
            drain_b.finish(db)

    return backward_weights


class ConvolutionOps(PlanningBackend):
    """Convolution forward and backward."""

    def convolution_forward(
        self, x: Array, w: Array, b: Array | None, y: Array, *, stride: Ints, pad: Ints, dilation: Ints, group: int, relu: bool = False
    ) -> None:
        key = ("convolution forward", signature(x), signature(w), None if b is None else signature(b), signature(y), stride, pad, dilation, group, relu)

        def build() -> Run:
            return plan_forward(Geometry(self.dnnl, x, w, y, stride, pad, dilation, group), x, w, b, y, relu)

        plan = self.plan(key, build)
        if plan is None:
            super().convolution_forward(x, w, b, y, stride=stride, pad=pad, dilation=dilation, group=group, relu=relu)
        else:
            plan(x.ctypes.data, w.ctypes.data, address(b), y.ctypes.data)

    def convolution_backward_data(self, dy: Array, w: Array, dx: Array, *, stride: Ints, pad: Ints, dilation: Ints, group: int) -> None:
        key = ("convolution backward data", signature(dy), signature(w), signature(dx), stride, pad, dilation, group)

        def build() -> Run:
            return plan_backward_data(Geometry(self.dnnl, dx, w, dy, stride, pad, dilation, group), dy, w, dx)

        plan = self.plan(key, build)
        if plan is None:
            super().convolution_backward_data(dy, w, dx, stride=stride, pad=pad, dilation=dilation, group=group)
        else:
            plan(dy.ctypes.data, w.ctypes.data, dx.ctypes.data)

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
    ) -> None:
        numbers = (stride, pad, dilation, group, accumulate_w, accumulate_b)
        key = ("convolution backward weights", signature(x), signature(dy), None if dw is None else signature(dw), db is None, *numbers)

        def build() -> Run:
            g = Geometry(self.dnnl, x, dw, dy, stride, pad, dilation, group)
            return plan_backward_weights(g, x, dy, db, accumulate_w, accumulate_b)

        plan = None if dw is None else self.plan(key, build)
        if plan is None:
            super().convolution_backward_weights(
                x, dy, dw, db, stride=stride, pad=pad, dilation=dilation, group=group, accumulate_w=accumulate_w, accumulate_b=accumulate_b
            )
        else:
            plan(x.ctypes.data, dy.ctypes.data, address(dw), address(db))
