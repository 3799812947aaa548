"""Convolution by Winograd's filters: kernels of 3 or 5 rows in about half of the products, or fewer.

In float32 the filters run along rows alone, which rounds little more than plain sums do. In bfloat16, on a processor whose products are only twice as
fast as float32's, they run along both axes, in float32, which rounds far less than bfloat16's own products (tests/test_onednn_winograd.py).

Rows are spread into n terms for each tile of an image, the terms multiplied by those of the filters, and the results gathered into rows, for a few
images at a time.
"""

from __future__ import annotations

import numpy as np

from caffelite.backends.contract import Array, Ints, is_usual
from caffelite.backends.onednn.dnnl import BF16, F32, Dnnl, Primitive, Unsupported
from caffelite.backends.onednn.matmul import column_sums, product
from caffelite.backends.onednn.plan import Feed, Run, type_of
from caffelite.backends.onednn.winograd_passes import Gather, Spread, matrices
from caffelite.backends.onednn.winograd_terms import RowGradients, RowTerms, Shape, TileGradients, TileTerms, row_of

KERNELS = {F32: (3, 5), BF16: (5,)}  # what there are filters for, and where they can pay
MOST_TERMS = {F32: 8, BF16: 10}  # of a tile along one axis: rounding grows with them
PIECE_BYTES = {F32: 12 << 20, BF16: 6 << 20}  # of terms held at a time
# Times in multiply-adds of plain float32 products, fitted to what machine B of docs/performance.md took: of a product of terms, which runs a little
# slower, and of making or gathering a term, along one axis or two.
PRODUCT, TERM = 1.15, {F32: 60, BF16: 100}
GAIN = 1.2  # at least so much quicker, by this reckoning, to be worth it


def shape_of(x: Array, w: Array, y: Array, stride: Ints, pad: Ints, dilation: Ints, group: int) -> Shape:
    """The convolution for the planners below. Unsupported where this way is not open to it."""
    dtype = type_of(x)
    plain = x.ndim == 4 and x.dtype == y.dtype and dtype in KERNELS and all(is_usual(z) for z in (x, w, y))
    if not plain or set(stride) != {1} or set(dilation) != {1}:
        raise Unsupported("not a convolution of stride 1 over two axes of plain blobs")
    if not set(w.shape[2:]) <= set(KERNELS[dtype]) or any(p >= k for p, k in zip(pad, w.shape[2:])):
        raise Unsupported("no filter for this kernel")
    return Shape(x.shape, w.shape, y.shape, pad, group, MOST_TERMS[dtype])


def pays(s: Shape, dtype: int) -> bool:
    """Whether this way is quicker than plain products, which take half the time in bfloat16."""
    rows, columns = s.axis(0), s.axis(1)
    filters, lines, width = s.w[0] * s.w[1], s.x[0] * rows.n * rows.tiles, s.y[3]
    plain, products, of_filters = s.x[0] * s.y[2] * width * s.w[2] * s.w[3], lines * width * s.w[3], rows.n * s.w[3]
    if dtype == BF16:
        width, of_filters = columns.n * columns.tiles, rows.n * columns.n
        plain, products = plain // 2, lines * width
    terms = lines * width * (s.x[1] + s.y[1]) + of_filters * filters
    return plain * filters > GAIN * (PRODUCT * products * filters + TERM[dtype] * terms)


def pieces(images: int, most: int) -> list[int]:
    """How many images to take at a time: nearly equal numbers, at most `most`."""
    count = -(-images // max(1, most))
    return [images // count + (i < images % count) for i in range(count)]


def sizes_of(s: Shape, dtype: int, *, backward: bool = False) -> list[int]:
    """The pieces of one pass."""
    rows, columns = (s.axis(i, backward=backward) for i in (0, 1))
    image = rows.n * rows.tiles * (row_of(s.x) + row_of(s.y))
    if dtype == BF16:
        image += rows.n * columns.n * rows.tiles * columns.tiles * (s.x[1] + s.y[1])
    return pieces(s.x[0], PIECE_BYTES[dtype] // (4 * image))


class Casts:
    """Pieces of a blob as float32: brought into scratch memory first where they are not, and taken from there."""

    def __init__(self, dnnl: Dnnl, dtype: int, elements: int, purpose: str) -> None:
        held, used = (dnnl.strided((elements,), (1,), t) for t in (dtype, F32))
        self.nbytes = held.nbytes
        self._in: Primitive | None = None if dtype == F32 else dnnl.reorder(held, used)
        self._out: Primitive | None = None if dtype == F32 else dnnl.reorder(used, held)
        self._scratch, self._purpose, self._used = dnnl.scratch, purpose, used.nbytes

    def target(self, address: int) -> int:
        return address if self._out is None else self._scratch.address(self._purpose, self._used)

    def read(self, address: int) -> int:
        held = self.target(address)
        if self._in is not None:
            self._in(address, held)
        return held

    def finish(self, address: int) -> None:
        if self._out is not None:
            self._out(self.target(address), address)


class Weights:
    """The filters' terms of rows, (n, filters, 1, columns, channels), from the weights, which may be bfloat16."""

    def __init__(self, dnnl: Dnnl, s: Shape, w_type: int, *, backward: bool) -> None:
        rows, (count, elements) = s.axis(0, backward=backward), (s.w[0], s.w[0] * s.w[2] * row_of(s.w))
        have, want = (dnnl.strided((elements,), (1,), t) for t in (w_type, F32))
        self._feed = Feed(dnnl, have, want, "weights")
        self._spread = Spread(dnnl, rows.weights(reverse=backward), count, row_of(s.w))
        self._nbytes, self._scratch = 4 * rows.n * count * row_of(s.w), dnnl.scratch

    def __call__(self, w: int) -> int:
        terms = self._scratch.address("plain filters", self._nbytes)
        self._spread(self._feed(w), terms)
        return terms


class Filtering:
    """y from x and w, or dx from dy and w: the same but for the order of the weights."""

    def __init__(self, dnnl: Dnnl, s: Shape, dtype: int, w_type: int, *, backward: bool, bias: bool = False, relu: bool = False) -> None:
        axis, shapes = s.axis(0, backward=backward), (s.y, s.x) if backward else (s.x, s.y)
        rows = [row_of(shape) for shape in shapes]
        self._scratch, self._nbytes = dnnl.scratch, [4 * axis.n * axis.tiles * row for row in rows]
        self._weights, self._sizes = Weights(dnnl, s, w_type, backward=backward), sizes_of(s, dtype, backward=backward)
        terms, layout = TileTerms if dtype == BF16 else RowTerms, None
        self._steps: dict[int, tuple[Casts, Spread, RowTerms | TileTerms, Gather, Casts]] = {}
        for size in set(self._sizes):
            made = terms(dnnl, s, size, backward=backward, layout=layout)
            layout = made.layout
            spread = Spread(dnnl, axis.windows(), size, rows[0])
            gather = Gather(dnnl, axis.filter.a, size, axis.outputs, rows[1], bias=bias, relu=relu)
            ins, outs = (Casts(dnnl, dtype, size * shape[2] * row, purpose) for shape, row, purpose in zip(shapes, rows, ("input", "output")))
            self._steps[size] = ins, spread, made, gather, outs

    def __call__(self, source: int, w: int, target: int, *bias: int) -> None:
        """bias: where a row of y with the bias in it lies."""
        filters = self._steps[self._sizes[0]][2].filters(self._weights(w))
        for size in self._sizes:
            ins, spread, multiply, gather, outs = self._steps[size]
            terms, made = (self._scratch.address(purpose, size * nbytes) for purpose, nbytes in zip(("terms", "terms made"), self._nbytes))
            spread(ins.read(source), terms)
            multiply(terms, filters, made)
            gather(made, outs.target(target), *bias)
            outs.finish(target)
            source, target = source + ins.nbytes, target + outs.nbytes


def plan_forward(dnnl: Dnnl, s: Shape, x: Array, w: Array, b: Array | None, relu: bool) -> Run:
    """Addresses of x, w, b (ignored without one) and y."""
    filtering = Filtering(dnnl, s, type_of(x), type_of(w), backward=False, bias=b is not None, relu=relu)
    if b is None:
        return lambda x, w, b, y: filtering(x, w, y)
    columns, outputs = s.y[3], s.y[1]
    feed = Feed(dnnl, dnnl.strided((outputs,), (b.strides[0] // b.itemsize,), type_of(b)), dnnl.strided((outputs,), (1,), F32), "bias")
    ones = np.ones(columns, np.float32)
    repeat = product(dnnl, matrices(dnnl, (columns, 1)), matrices(dnnl, (1, outputs)), None, matrices(dnnl, (columns, outputs)))

    def forward(x: int, w: int, b: int, y: int) -> None:
        line = dnnl.scratch.address("row of biases", 4 * row_of(s.y))
        repeat(ones.ctypes.data, feed(b), line)
        filtering(x, w, y, line)

    return forward


def plan_backward_data(dnnl: Dnnl, s: Shape, dy: Array, w: Array) -> Run:
    """Addresses of dy, w and dx."""
    return Filtering(dnnl, s, type_of(dy), type_of(w), backward=True)


class WeightGradients:
    """dw from x and dy: the gradients of the filters' terms, summed over pieces, then gathered into the filters' rows."""

    def __init__(self, dnnl: Dnnl, s: Shape, dtype: int, *, add: bool) -> None:
        axis, rows = s.axis(0), [row_of(shape) for shape in (s.x, s.y)]
        self._scratch, self._nbytes, self._sizes = dnnl.scratch, [4 * axis.n * axis.tiles * row for row in rows], sizes_of(s, dtype)
        self._plain = 4 * axis.n * s.w[0] * row_of(s.w)
        gradients = TileGradients if dtype == BF16 else RowGradients
        self._steps: dict[int, tuple[Casts, Spread, Casts, Spread, RowGradients | TileGradients]] = {}
        for size in set(self._sizes):
            x, dy = (Casts(dnnl, dtype, size * shape[2] * row, purpose) for shape, row, purpose in zip((s.x, s.y), rows, ("input", "second input")))
            spreads = (Spread(dnnl, matrix, size, row) for matrix, row in zip((axis.windows(), axis.gradients()), rows))
            self._steps[size] = x, next(spreads), dy, next(spreads), gradients(dnnl, s, size)
        self._gather = Gather(dnnl, axis.filter.g.T, s.w[0], axis.kernel, row_of(s.w), add=add)

    def __call__(self, x: int, dy: int, dw: int) -> None:
        plain, count = self._scratch.address("plain filters", self._plain), len(self._sizes)
        for i, size in enumerate(self._sizes):
            read_x, spread_x, read_dy, spread_dy, multiply = self._steps[size]
            terms, given = (self._scratch.address(purpose, size * nbytes) for purpose, nbytes in zip(("terms", "terms made"), self._nbytes))
            spread_x(read_x.read(x), terms)
            spread_dy(read_dy.read(dy), given)
            multiply(terms, given, plain, more=i > 0, last=i + 1 == count)
            x, dy = x + read_x.nbytes, dy + read_dy.nbytes
        self._gather(plain, dw)


def plan_backward_weights(dnnl: Dnnl, s: Shape, x: Array, bias: bool, add_w: bool, add_b: bool) -> Run:
    """Addresses of x, dy, dw and db (ignored without a bias)."""
    gradients = WeightGradients(dnnl, s, type_of(x), add=add_w)
    sums = column_sums(dnnl, s.y[0] * s.y[2] * s.y[3], s.y[1], type_of(x), add=add_b) if bias else None

    def backward_weights(x: int, dy: int, dw: int, db: int) -> None:
        gradients(x, dy, dw)
        if sums is not None:
            sums(dy, db)

    return backward_weights
