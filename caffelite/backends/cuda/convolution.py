"""Convolution: over one or two spatial axes by gemm.py, over more of them by the plain kernels/convolution.cu."""

from __future__ import annotations

import numpy as np

from caffelite.backends.contract import Array, Drop, Ints
from caffelite.backends.cuda import gemm
from caffelite.backends.cuda.common import THREADS, blocks, cname
from caffelite.backends.cuda.dropout import drop_in_place, take_on
from caffelite.backends.cuda.launch import Module, typed
from caffelite.backends.cuda.scale_bias import ScaleBias
from caffelite.backends.cuda.space import Space
from caffelite.errors import BackendError

MOST_AXES = 6
SPACE = np.dtype(
    [
        *((name, np.int32) for name in ("axes", "images", "channels", "outputs", "group_channels", "group_outputs", "cells", "inside", "out_inside")),
        *((name, np.int32, MOST_AXES) for name in ("size", "out", "kernel", "stride", "pad", "dilation")),
    ],
    align=True,
)
CONVOLUTION = Module(
    "convolution",
    [*typed("convolution_forward", arguments=3), *typed("convolution_backward_data", arguments=2), *typed("convolution_backward_weights")],
)


class Convolution(ScaleBias):  # whose sum is the bias gradient too
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
        if x.ndim == 3:
            line = _Line(self, x, w, y, stride, pad, dilation, group)
            self._move(line.given(x), line.x)
            gemm.forward(self, line.geometry, line.x, line.weights(w), b, line.y, gemm.Finish(relu), tf32=tf32)
            self._move(line.y, line.given(y))
            drop_in_place(self, y, drop)
            return
        if x.ndim == 4:
            gemm.forward(self, gemm.Geometry(x.shape, w.shape, y.shape, stride, pad, dilation, group), x, w, b, y, gemm.Finish(relu, drop), tf32=tf32)
            return
        name = f"convolution_forward<{cname(x)}, {cname(w)}, {'float' if b is None else cname(b)}>"
        space = _space(x.shape, w.shape, y.shape, stride, pad, dilation, group)
        self.launch(CONVOLUTION, name, blocks(y.size), THREADS, x, w, b, y, space, np.bool_(relu), np.int64(y.size))
        drop_in_place(self, y, drop)

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
        if dx.ndim == 3:
            line = _Line(self, dx, w, dy, stride, pad, dilation, group)
            self._move(line.given(dy), line.y)
            gemm.backward_data(self, line.geometry, line.y, line.weights(w), line.x, gemm.Finish(), tf32=tf32)
            self._move(line.x, line.given(dx))
            take_on(self, dx, positive, ratio)
            return
        if dx.ndim == 4:
            gemm.backward_data(
                self,
                gemm.Geometry(dx.shape, w.shape, dy.shape, stride, pad, dilation, group),
                dy,
                w,
                dx,
                gemm.Finish(positive=positive, ratio=ratio),
                tf32=tf32,
            )
            return
        space = _space(dx.shape, w.shape, dy.shape, stride, pad, dilation, group)
        above = positive if ratio is None else None
        self.launch(CONVOLUTION, f"convolution_backward_data<{cname(dx)}, {cname(w)}>", blocks(dx.size), THREADS, dy, w, dx, above, space, np.int64(dx.size))
        if ratio is not None:
            take_on(self, dx, positive, ratio)

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
        if dw is not None and x.ndim == 3:
            line = _Line(self, x, dw, dy, stride, pad, dilation, group)
            for there, here in ((x, line.x), (dy, line.y)):
                self._move(line.given(there), here)
            made = line.weights(dw)  # what it holds is added to where gradients accumulate
            gemm.backward_weights(self, line.geometry, line.x, line.y, gemm.Gradients(made, db, accumulate_w, accumulate_b), tf32=tf32)
            self._move(made, line.given(dw))
            return
        if dw is not None and x.ndim == 4:
            g = gemm.Geometry(x.shape, dw.shape, dy.shape, stride, pad, dilation, group)
            gemm.backward_weights(self, g, x, dy, gemm.Gradients(dw, db, accumulate_w, accumulate_b), tf32=tf32)
            return
        if dw is not None:
            space = _space(x.shape, dw.shape, dy.shape, stride, pad, dilation, group)
            name = f"convolution_backward_weights<{cname(x)}>"
            self.launch(CONVOLUTION, name, blocks(dw.size), THREADS, x, dy, dw, space, np.bool_(accumulate_w), np.int64(dw.size))
        if db is not None:
            self.bias_backward(dy, db.reshape((1, -1) + (1,) * (dy.ndim - 2)), accumulate=accumulate_b)


class _Line:
    """A convolution along one axis as one in two dimensions of height 1: blobs (N,C,L), which lie in C order, as (N,C,1,L) channels last."""

    def __init__(self, ops: Convolution, x: Array, w: Array, y: Array, stride: Ints, pad: Ints, dilation: Ints, group: int) -> None:
        shapes = [_flat(array) for array in (x, w, y)]
        self.geometry = gemm.Geometry(shapes[0], shapes[1], shapes[2], (1, *stride), (0, *pad), (1, *dilation), group)
        arrays = dict(zip("xwy", (x, w, y)))
        space = Space(ops, "line", **{name: array.size * array.itemsize for name, array in arrays.items()})
        self.x, self._w, self.y = (space.part(name, array.dtype, shape) for (name, array), shape in zip(arrays.items(), shapes))
        self._ops = ops

    def given(self, array: Array) -> Array:
        """The blob itself with an axis of height 1."""
        return array.reshape(_flat(array))

    def weights(self, w: Array) -> Array:
        """A copy of w, cells before channels."""
        self._ops._move(self.given(w), self._w)
        return self._w


def _flat(array: Array) -> Ints:
    return (*array.shape[:2], 1, array.shape[2])


def _space(x: Ints, w: Ints, y: Ints, stride: Ints, pad: Ints, dilation: Ints, group: int) -> np.void:
    """The plain kernels' struct Space."""
    axes = len(x) - 2
    if axes > MOST_AXES:
        raise BackendError(f"the cuda backend convolves over at most {MOST_AXES} spatial axes, found {axes}", hint="use --backend onednn")
    counts = [int(np.prod(sizes)) for sizes in (w[2:], x[2:], y[2:])]
    vectors = [tuple(values) + (1,) * (MOST_AXES - axes) for values in (x[2:], y[2:], w[2:], stride, pad, dilation)]
    return np.void((axes, x[0], x[1], y[1], w[1], y[1] // group, *counts, *vectors), SPACE)
