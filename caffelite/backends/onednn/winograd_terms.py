"""The products of the terms of Winograd's filters, for filters along rows alone (Row...) or along rows and columns (Tile...).

Terms come as Spread leaves them: (n, images, tiles, columns, channels), those of the filters (n, filters, columns, channels). Where columns are filtered
as well, there are n terms for each tile of columns in place of the columns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from caffelite.backends.contract import Array, Ints, strides_of
from caffelite.backends.onednn.convolution_geometry import Geometry
from caffelite.backends.onednn.convolution_weights import numbers, weights_descriptor
from caffelite.backends.onednn.dnnl import CONVOLUTION_DIRECT, DIFF_DST, DIFF_SRC, DIFF_WEIGHTS, DST, F32, SRC, WEIGHTS, Descriptor, Dnnl, Primitive
from caffelite.backends.onednn.matmul import prepared, product
from caffelite.backends.onednn.plan import Drain
from caffelite.backends.onednn.winograd import Axis
from caffelite.backends.onednn.winograd_passes import matrices


class Shape(NamedTuple):
    """One convolution of stride 1: x (images, inputs, rows, columns), w (outputs, inputs of a group, kernel's rows, columns), y as x."""

    x: Ints
    w: Ints
    y: Ints
    pad: Ints
    group: int
    across: bool  # whether columns are filtered as well as rows
    most: int  # terms of a tile along one axis

    def axis(self, i: int, *, backward: bool = False) -> Axis:
        """Rows (0) or columns (1). backward: of the filter that takes gradients of y to those of x."""
        size, outputs, kernel, pad = self.x[2 + i], self.y[2 + i], self.w[2 + i], self.pad[i]
        return Axis(outputs, size, kernel - 1 - pad, kernel, self.most) if backward else Axis(size, outputs, pad, kernel, self.most)

    def row(self, shape: Ints, *, backward: bool = False) -> int:
        """Elements in one row of a blob of this shape, or of its terms where columns are filtered."""
        columns = self.axis(1, backward=backward)
        return shape[1] * (columns.tiles * columns.n if self.across else shape[3])

    def row_w(self, *, backward: bool = False) -> int:
        """The same for the filters."""
        return self.w[1] * (self.axis(1, backward=backward).n if self.across else self.w[3])


def hollow(*shape: int) -> Array:
    """An array with a blob's strides and no memory of its own, to describe."""
    return np.lib.stride_tricks.as_strided(np.empty(1, np.float32), shape, strides_of(shape, 4))


def row_geometry(dnnl: Dnnl, s: Shape, images: int) -> tuple[Geometry, Descriptor, Descriptor]:
    """The convolution of one term of rows, its x and its y."""
    x, w, y = hollow(images, s.x[1], 1, s.x[3]), hollow(*s.w[:2], 1, s.w[3]), hollow(images, s.y[1], 1, s.y[3])
    g = Geometry(dnnl, x, w, y, (1, 1), (0, s.pad[1]), (1, 1), s.group)
    return g, g.activation(x), g.activation(y)


class RowTerms:
    """Forward or backward to the data: each term is a convolution with one row of weights, computed as any other.

    layout: how the filters' terms lie, where this has been decided already."""

    def __init__(self, dnnl: Dnnl, s: Shape, images: int, *, backward: bool, layout: Descriptor | None = None) -> None:
        rows = s.axis(0, backward=backward)
        g, x, y = row_geometry(dnnl, s, images * rows.tiles)
        hint, weights = g.forward(x, y, bias=False), layout or dnnl.any(g.w_shape, F32)
        if backward:
            kind, order, shapes = ("convolution_backward_data", CONVOLUTION_DIRECT), (DIFF_DST, WEIGHTS, DIFF_SRC), (s.y, s.x)
            descriptor = dnnl.primitive_descriptor(*kind, x, weights, y, *g.steps, hint, dnnl.plain)
        else:
            order, shapes = (SRC, WEIGHTS, DST), (s.x, s.y)
            descriptor = hint if layout is None else g.forward(x, y, bias=False, weights=layout)
        self.layout = dnnl.argument(descriptor, WEIGHTS)
        self._n, self._multiply = rows.n, Primitive(dnnl, descriptor, order)
        self._steps = [4 * images * rows.tiles * s.row(shape, backward=backward) for shape in shapes]
        self._plain, self._step = 4 * s.w[0] * s.row_w(backward=backward), -(-self.layout.nbytes // 64) * 64
        self._reorder, self._scratch = dnnl.reorder(g.weights(F32), self.layout), dnnl.scratch

    def filters(self, plain: int) -> int:
        """The filters' terms as the products want them."""
        made = self._scratch.address("filters", self._n * self._step)
        for j in range(self._n):
            self._reorder(plain + j * self._plain, made + j * self._step)
        return made

    def __call__(self, terms: int, filters: int, made: int) -> None:
        for j in range(self._n):
            self._multiply(terms + j * self._steps[0], filters + j * self._step, made + j * self._steps[1])


class TileTerms:
    """The same where columns are filtered as well: one matrix product over the channels for each pair of terms."""

    def __init__(self, dnnl: Dnnl, s: Shape, images: int, *, backward: bool, layout: Descriptor | None = None) -> None:
        rows, columns = (s.axis(i, backward=backward) for i in (0, 1))
        inputs, outputs = (s.y[1], s.x[1]) if backward else (s.x[1], s.y[1])
        ins, outs, tiles, pair = inputs // s.group, outputs // s.group, images * rows.tiles * columns.tiles, (rows.n, columns.n)
        left = matrices(dnnl, (*pair, tiles, ins), (tiles * columns.n * inputs, inputs, columns.n * inputs, 1))
        made = matrices(dnnl, (*pair, tiles, outs), (tiles * columns.n * outputs, outputs, columns.n * outputs, 1))
        self._multiply, self.layout = prepared(dnnl, left, layout or dnnl.any((*pair, ins, outs), F32), None, made)
        row = s.row_w(backward=backward)
        steps = (row, 1) if backward else (1, row)
        self._reorder = dnnl.reorder(matrices(dnnl, (*pair, ins, outs), (s.w[0] * row, s.w[1], *steps)), self.layout)
        self._group, self._steps, self._plain = s.group, (4 * ins, 4 * outs), 4 * s.w[0] // s.group * row
        self._step, self._scratch = -(-self.layout.nbytes // 64) * 64, dnnl.scratch

    def filters(self, plain: int) -> int:
        made = self._scratch.address("filters", self._group * self._step)
        for i in range(self._group):
            self._reorder(plain + i * self._plain, made + i * self._step)
        return made

    def __call__(self, terms: int, filters: int, made: int) -> None:
        for i in range(self._group):
            self._multiply(terms + i * self._steps[0], filters + i * self._step, made + i * self._steps[1])


class RowGradients:
    """Gradients of the filters' terms of rows: for each term, that of the weights of a convolution with one row of weights."""

    def __init__(self, dnnl: Dnnl, s: Shape, images: int) -> None:
        rows = s.axis(0)
        g, x, y = row_geometry(dnnl, s, images * rows.tiles)
        descriptor = weights_descriptor(g, x, y, bias=False)
        made, plain = dnnl.argument(descriptor, DIFF_WEIGHTS), g.weights(F32)
        self._n, self._multiply = rows.n, Primitive(dnnl, descriptor, numbers(False))
        self._steps = [4 * images * rows.tiles * s.row(shape) for shape in (s.x, s.y)]
        self._plain, self._drains = 4 * s.w[0] * s.row_w(), [Drain(dnnl, made, plain, "weights", add=more) for more in (False, True)]

    def __call__(self, x: int, dy: int, plain: int, *, more: bool) -> None:
        """plain: where the filters' terms lie. more: what is there is added to."""
        drain = self._drains[more]
        for j in range(self._n):
            target = plain + j * self._plain
            self._multiply(x + j * self._steps[0], dy + j * self._steps[1], drain.target(target))
            drain.finish(target)


class TileGradients:
    """The same where columns are filtered as well."""

    def __init__(self, dnnl: Dnnl, s: Shape, images: int) -> None:
        rows, columns = s.axis(0), s.axis(1)
        inputs, outputs = s.x[1], s.y[1]
        ins, outs, tiles, pair = inputs // s.group, outputs // s.group, images * rows.tiles * columns.tiles, (rows.n, columns.n)
        left = matrices(dnnl, (*pair, outs, tiles), (tiles * columns.n * outputs, outputs, 1, columns.n * outputs))
        right = matrices(dnnl, (*pair, tiles, ins), (tiles * columns.n * inputs, inputs, columns.n * inputs, 1))
        made = matrices(dnnl, (*pair, outs, ins), (outputs * s.row_w(), ins, s.row_w(), 1))
        self._multiply = [product(dnnl, left, right, None, made, add=more) for more in (False, True)]
        self._group, self._steps = s.group, (4 * ins, 4 * outs, 4 * outs * s.row_w())

    def __call__(self, x: int, dy: int, plain: int, *, more: bool) -> None:
        for i in range(self._group):
            read, given, write = (i * step for step in self._steps)
            self._multiply[more](dy + given, x + read, plain + write)
