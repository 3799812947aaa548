"""The weights' gradient of a convolution: three ways, each the quickest somewhere.

Seen on one Zen 5 core (GFLOP/s, float32, 16 images): 1x1 192->160 at 48x48: convolution primitive 127, matrix product 189;
5x5 3->192 at 48x48: channels-last 75, planes and blocks 140; 5x5 96->192 at 24x24: channels-last 258. In bfloat16 the
channels-last primitive is as quick or quicker everywhere.
"""

from __future__ import annotations

from math import prod

from caffelite.backends.contract import Array, is_usual
from caffelite.backends.onednn.convolution_geometry import Geometry
from caffelite.backends.onednn.dnnl import (
    CONVOLUTION_DIRECT,
    DIFF_BIAS,
    DIFF_DST,
    DIFF_WEIGHTS,
    F32,
    SRC,
    Descriptor,
    Dnnl,
    Primitive,
    PrimitiveDescriptor,
    Unsupported,
)
from caffelite.backends.onednn.matmul import column_sums, product
from caffelite.backends.onednn.plan import Drain, Feed, Run, describe

FEW_CHANNELS = 3  # up to here oneDNN has kernels that read whole planes
FEW_THREADS = 8  # a small product does not feed more; the convolution primitive also splits the images
PIECE_BYTES = 1 << 24  # of the gradient brought into blocks at a time; stays in the last-level cache


def plan_backward_weights(g: Geometry, x: Array, dy: Array, dw: Array, db: Array | None, add_w: bool, add_b: bool, threads: int) -> Run:
    """A plan over the addresses of x, dy, dw and db (ignored without db)."""
    if g.type == F32 and g.pointwise and threads <= FEW_THREADS and all(is_usual(z) for z in (x, dy, dw)):
        return by_product(g.dnnl, x, dy, dw, db, add_w, add_b)
    if g.type == F32 and g.group == 1 and x.shape[1] <= FEW_CHANNELS and is_usual(x) and is_usual(dy) and dy.ndim == 4:
        try:
            return by_planes(g, x, dy, db, add_w, add_b)
        except Unsupported:
            pass
    return by_convolution(g, x, dy, db, add_w, add_b)


def by_product(dnnl: Dnnl, x: Array, dy: Array, dw: Array, db: Array | None, add_w: bool, add_b: bool) -> Run:
    """1x1: dw = dy^T x over all positions."""
    rows, inputs, outputs = x.size // x.shape[1], x.shape[1], dy.shape[1]
    left, right = dnnl.strided((outputs, rows), (1, outputs), F32), dnnl.strided((rows, inputs), (inputs, 1), F32)
    multiply = product(dnnl, left, right, None, dnnl.strided((outputs, inputs), (inputs, 1), F32), add=add_w)
    sums = None if db is None else column_sums(dnnl, rows, outputs, F32, add=add_b)

    def backward_weights(x: int, dy: int, dw: int, db: int) -> None:
        multiply(dy, x, dw)
        if sums is not None:
            sums(dy, db)

    return backward_weights


def weights_descriptor(g: Geometry, x: Descriptor, dy: Descriptor, *, bias: bool) -> PrimitiveDescriptor:
    """Gradients leave in float32 whatever the operands are."""
    hint, made_w, made_b = g.forward(x, dy, bias=bias), g.dnnl.any(g.w_shape, F32), g.bias() if bias else None
    return g.dnnl.primitive_descriptor("convolution_backward_weights", CONVOLUTION_DIRECT, x, made_w, made_b, dy, *g.steps, hint, g.dnnl.plain)


class Gradients:
    """Takes dw and db from where the primitive leaves them, adding or overwriting."""

    def __init__(self, g: Geometry, descriptor: PrimitiveDescriptor, *, bias: bool, add_w: bool, add_b: bool) -> None:
        made = g.bias()
        self._w = Drain(g.dnnl, g.dnnl.argument(descriptor, DIFF_WEIGHTS), g.weights(F32), "weights", add=add_w)
        self._b = Drain(g.dnnl, made, made, "bias", add=add_b) if bias else None

    def targets(self, dw: int, db: int) -> tuple[int, ...]:
        return (self._w.target(dw),) if self._b is None else (self._w.target(dw), self._b.target(db))

    def finish(self, dw: int, db: int) -> None:
        self._w.finish(dw)
        if self._b is not None:
            self._b.finish(db)


def numbers(bias: bool) -> tuple[int, ...]:
    return (SRC, DIFF_DST, DIFF_WEIGHTS, DIFF_BIAS) if bias else (SRC, DIFF_DST, DIFF_WEIGHTS)


def by_convolution(g: Geometry, x: Array, dy: Array, db: Array | None, add_w: bool, add_b: bool) -> Run:
    """Any convolution, activations as they lie."""
    dnnl, bias = g.dnnl, db is not None
    descriptor = weights_descriptor(g, g.activation(x), g.activation(dy), bias=bias)
    feed_x = Feed(dnnl, describe(dnnl, x), dnnl.argument(descriptor, SRC), "input")
    feed_dy = Feed(dnnl, describe(dnnl, dy), dnnl.argument(descriptor, DIFF_DST), "second input")
    gradients, run = Gradients(g, descriptor, bias=bias, add_w=add_w, add_b=add_b), Primitive(dnnl, descriptor, numbers(bias))

    def backward_weights(x: int, dy: int, dw: int, db: int) -> None:
        run(feed_x(x), feed_dy(dy), *gradients.targets(dw, db))
        gradients.finish(dw, db)

    return backward_weights


def by_planes(g: Geometry, x: Array, dy: Array, db: Array | None, add_w: bool, add_b: bool) -> Run:
    """First layers: x as planes, dy in the primitive's own blocks, a few images at a time so that the copies stay small."""
    dnnl, bias, count = g.dnnl, db is not None, len(x)
    fitting = max(1, PIECE_BYTES // (dy.itemsize * prod(dy.shape[1:])))
    images = max(n for n in range(1, count + 1) if count % n == 0 and n <= fitting)
    shapes = [(images, *z.shape[1:]) for z in (x, dy)]
    planes = dnnl.strided(shapes[0], (prod(x.shape[1:]), prod(x.shape[2:]), x.shape[3], 1), F32)
    descriptor = weights_descriptor(g, planes, dnnl.any(shapes[1], F32), bias=bias)
    feed_x = Feed(dnnl, describe(dnnl, x[:images]), planes, "input")
    feed_dy = Feed(dnnl, describe(dnnl, dy[:images]), dnnl.argument(descriptor, DIFF_DST), "second input")
    first = Gradients(g, descriptor, bias=bias, add_w=add_w, add_b=add_b)
    later = Gradients(g, descriptor, bias=bias, add_w=True, add_b=True)
    run, rounds, steps = Primitive(dnnl, descriptor, numbers(bias)), count // images, (x.strides[0] * images, dy.strides[0] * images)

    def backward_weights(x: int, dy: int, dw: int, db: int) -> None:
        for i in range(rounds):
            gradients = later if i else first
            run(feed_x(x + i * steps[0]), feed_dy(dy + i * steps[1]), *gradients.targets(dw, db))
            gradients.finish(dw, db)

    return backward_weights
