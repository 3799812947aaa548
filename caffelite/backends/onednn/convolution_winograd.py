"""Convolution by Winograd's filters: kernels of 3 or 5 rows in about half of the products, or fewer.

In float32 the filters run along rows alone, which rounds a few times as much as plain sums do. In bfloat16, on a processor whose products are only twice
as fast as float32's, they run along both axes, in float32, which rounds more than plain sums of the same products, but far less than the blobs have been
rounded already (tests/test_onednn_winograd.py). What is rounded is in proportion to the largest values of a tile: a result that would be exactly 0 beside
large ones may come out as a tiny number, and an infinity makes NaN of its tiles.

Rows are spread into n terms for each tile of an image, the terms multiplied by those of the filters, and the results gathered into rows, for a few
images at a time; where columns are filtered as well, they are spread before the rows and gathered after them.
"""

from __future__ import annotations

import numpy as np

from caffelite.backends.contract import Array, Ints, is_usual
from caffelite.backends.onednn.dnnl import BF16, F32, Descriptor, Dnnl, Unsupported
from caffelite.backends.onednn.matmul import column_sums, product
from caffelite.backends.onednn.plan import Feed, Run, describe, type_of
from caffelite.backends.onednn.winograd_passes import Entry, Exit, Gather, Lines, Spread, matrices
from caffelite.backends.onednn.winograd_terms import RowGradients, RowTerms, Shape, TileGradients, TileTerms

KERNELS = {F32: (3, 5), BF16: (5,)}  # what there are filters for, and where they can pay
MOST_TERMS = {F32: 8, BF16: 10}  # of a tile along one axis: rounding grows with them
PIECE_BYTES = 12 << 20  # of terms held at a time
# Times in multiply-adds of plain float32 products, fitted to what machine B of docs/performance.md took: of a product of terms, which runs a little
# slower, and of making or gathering a term, to which columns add the multiplications by all of their line.
PRODUCT, TERM, TERM_OF_COLUMNS, PIXEL = 1.15, 60, 45, 0.5
# At least so much quicker, by this reckoning, to be worth it: along rows, and along both axes, whose more passes weigh more where caches are cold.
# AlexNet's conv2 in bfloat16, reckoned 1.23 times quicker and measured so by itself, made no step quicker.
GAIN = {False: 1.2, True: 1.5}


def shape_of(x: Array, w: Array, y: Array, stride: Ints, pad: Ints, dilation: Ints, group: int) -> Shape:
    """The convolution for the planners below. Unsupported where this way is not open to it."""
    dtype = type_of(x)
    plain = x.ndim == 4 and x.dtype == y.dtype and dtype in KERNELS and all(is_usual(z) for z in (x, w, y))
    if not plain or set(stride) != {1} or set(dilation) != {1}:
        raise Unsupported("not a convolution of stride 1 over two axes of plain blobs")
    if not set(w.shape[2:]) <= set(KERNELS[dtype]) or any(p >= k for p, k in zip(pad, w.shape[2:])):
        raise Unsupported("no filter for this kernel")
    return Shape(x.shape, w.shape, y.shape, pad, group, dtype == BF16, MOST_TERMS[dtype])


def pays(s: Shape) -> bool:
    """Whether this way is quicker than plain products, which take half the time in bfloat16."""
    rows, columns, width, kernel = s.axis(0), s.axis(1), s.y[3], s.w[3]
    filters, lines, plain = s.w[0] * s.w[1], s.x[0] * rows.n * rows.tiles, s.x[0] * s.y[2] * width * s.w[2] * kernel
    if s.across:
        plain, products, of_filters = plain // 2, lines * columns.n * columns.tiles, rows.n * columns.n
        made, term = products, TERM_OF_COLUMNS + PIXEL * width
    else:
        products, of_filters, made, term = lines * width * kernel, rows.n * kernel, lines * width, TERM
    terms = made * (s.x[1] + s.y[1]) + of_filters * filters
    return plain * filters > GAIN[s.across] * (PRODUCT * products * filters + term * terms)


def pieces(images: int, most: int) -> list[int]:
    """How many images to take at a time: nearly equal numbers, at most `most`."""
    count = -(-images // max(1, most))
    return [images // count + (i < images % count) for i in range(count)]


def sizes_of(s: Shape, *, backward: bool = False) -> list[int]:
    """The pieces of one pass."""
    rows = s.axis(0, backward=backward)
    image = rows.n * rows.tiles * (s.row(s.x, backward=backward) + s.row(s.y, backward=backward))
    return pieces(s.x[0], PIECE_BYTES // (4 * image))


class Weights:
    """The filters' terms from the weights, which may be bfloat16."""

    def __init__(self, dnnl: Dnnl, s: Shape, w_type: int, *, backward: bool) -> None:
        rows, columns = (s.axis(i, backward=backward) for i in (0, 1))
        count, channels, height, width = s.w
        along = columns.weights(reverse=backward) if s.across else None
        self._entry = Entry(dnnl, w_type, count * height, width, channels, along, "weights")
        row = s.row_w(backward=backward)
        self._spread = Spread(dnnl, rows.weights(reverse=backward), count, row)
        self._nbytes, self._scratch = 4 * rows.n * count * row, dnnl.scratch

    def __call__(self, w: int) -> int:
        terms = self._scratch.address("plain filters", self._nbytes)
        self._spread(self._entry(w), terms)
        return terms


class Filtering:
    """y from x and w, or dx from dy and w: the same but for the order of the weights."""

    def __init__(self, dnnl: Dnnl, s: Shape, dtype: int, w_type: int, *, backward: bool, bias: bool = False, relu: bool = False) -> None:
        rows, columns = (s.axis(i, backward=backward) for i in (0, 1))
        source, target = (s.y, s.x) if backward else (s.x, s.y)
        widths = [s.row(shape, backward=backward) for shape in (source, target)]
        self._across, self._scratch, self._nbytes = s.across, dnnl.scratch, [4 * rows.n * rows.tiles * width for width in widths]
        self._weights, self._sizes = Weights(dnnl, s, w_type, backward=backward), sizes_of(s, backward=backward)
        windows, results = (columns.windows(), columns.results()) if s.across else (None, None)
        layout: Descriptor | None = None
        self._steps: dict[int, tuple[Entry, Spread, RowTerms | TileTerms, Gather, Exit]] = {}
        for size in set(self._sizes):
            made = (TileTerms if s.across else RowTerms)(dnnl, s, size, backward=backward, layout=layout)
            layout = made.layout
            entry = Entry(dnnl, dtype, size * source[2], source[3], source[1], windows, "input")
            gather = Gather(dnnl, rows.filter.a, size, rows.outputs, widths[1], bias=bias and not s.across, relu=relu and not s.across)
            leave = Exit(dnnl, dtype, size * target[2], target[3], target[1], results, bias=bias, relu=relu)
            self._steps[size] = entry, Spread(dnnl, rows.windows(), size, widths[0]), made, gather, leave

    def __call__(self, source: int, w: int, target: int, *bias: int) -> None:
        """bias: where a row of y, or a pixel of it, with the bias in it lies: for the last pass."""
        here, there = ((), bias) if self._across else (bias, ())
        filters = self._steps[self._sizes[0]][2].filters(self._weights(w))
        for size in self._sizes:
            entry, spread, multiply, gather, leave = self._steps[size]
            terms, made = (self._scratch.address(purpose, size * nbytes) for purpose, nbytes in zip(("terms", "terms made"), self._nbytes))
            spread(entry(source), terms)
            multiply(terms, filters, made)
            gather(made, leave.target(target), *here)
            leave.finish(target, *there)
            source, target = source + entry.nbytes, target + leave.nbytes


def plan_forward(dnnl: Dnnl, s: Shape, x: Array, w: Array, b: Array | None, relu: bool) -> Run:
    """Addresses of x, w, b (ignored without one) and y."""
    filtering = Filtering(dnnl, s, type_of(x), type_of(w), backward=False, bias=b is not None, relu=relu)
    if b is None:
        return lambda x, w, b, y: filtering(x, w, y)
    columns, outputs = 1 if s.across else s.y[3], s.y[1]
    feed = Feed(dnnl, describe(dnnl, b), dnnl.strided((outputs,), (1,), F32), "bias")
    ones = np.ones(columns, np.float32)
    repeat = product(dnnl, matrices(dnnl, (columns, 1)), matrices(dnnl, (1, outputs)), None, matrices(dnnl, (columns, outputs)))

    def forward(x: int, w: int, b: int, y: int) -> None:
        line = dnnl.scratch.address("row of biases", 4 * columns * outputs)
        repeat(ones.ctypes.data, feed(b), line)
        filtering(x, w, y, line)

    return forward


def plan_backward_data(dnnl: Dnnl, s: Shape, dy: Array, w: Array) -> Run:
    """Addresses of dy, w and dx."""
    return Filtering(dnnl, s, type_of(dy), type_of(w), backward=True)


class WeightGradients:
    """dw from x and dy: the gradients of the filters' terms, summed over pieces, then gathered into the filters' rows and columns."""

    def __init__(self, dnnl: Dnnl, s: Shape, dtype: int, *, add: bool) -> None:
        rows, columns, (count, channels, height, _) = s.axis(0), s.axis(1), s.w
        widths = [s.row(shape) for shape in (s.x, s.y)]
        self._scratch, self._nbytes, self._sizes = dnnl.scratch, [4 * rows.n * rows.tiles * width for width in widths], sizes_of(s)
        self._plain, self._held = 4 * rows.n * count * s.row_w(), 4 * count * height * s.row_w()
        windows, results = (columns.windows(), columns.results()) if s.across else (None, None)
        self._steps: dict[int, tuple[Entry, Spread, Entry, Spread, RowGradients | TileGradients]] = {}
        for size in set(self._sizes):
            x = Entry(dnnl, dtype, size * s.x[2], s.x[3], s.x[1], windows, "input")
            dy = Entry(dnnl, dtype, size * s.y[2], s.y[3], s.y[1], results, "second input")
            spreads = [Spread(dnnl, matrix, size, width) for matrix, width in zip((rows.windows(), rows.results()), widths)]
            gradients = (TileGradients if s.across else RowGradients)(dnnl, s, size)
            self._steps[size] = x, spreads[0], dy, spreads[1], gradients
        self._gather = Gather(dnnl, rows.filter.g.T, count, height, s.row_w(), add=add and not s.across)
        self._leave = Lines(dnnl, columns.weights(), count * height, channels, back=True, add=add) if s.across else None

    def __call__(self, x: int, dy: int, dw: int) -> None:
        plain = self._scratch.address("plain filters", self._plain)
        for i, size in enumerate(self._sizes):
            read_x, spread_x, read_dy, spread_dy, multiply = self._steps[size]
            terms, given = (self._scratch.address(purpose, size * nbytes) for purpose, nbytes in zip(("terms", "terms made"), self._nbytes))
            spread_x(read_x(x), terms)
            spread_dy(read_dy(dy), given)
            multiply(terms, given, plain, more=i > 0)
            x, dy = x + read_x.nbytes, dy + read_dy.nbytes
        if self._leave is None:
            self._gather(plain, dw)
        else:
            held = self._scratch.address("weights", self._held)
            self._gather(plain, held)
            self._leave(held, dw)


def plan_backward_weights(dnnl: Dnnl, s: Shape, x: Array, bias: bool, add_w: bool, add_b: bool) -> Run:
    """Addresses of x, dy, dw and db (ignored without a bias)."""
    gradients = WeightGradients(dnnl, s, type_of(x), add=add_w)
    sums = column_sums(dnnl, s.y[0] * s.y[2] * s.y[3], s.y[1], type_of(x), add=add_b) if bias else None

    def backward_weights(x: int, dy: int, dw: int, db: int) -> None:
        gradients(x, dy, dw)
        if sums is not None:
            sums(dy, db)

    return backward_weights
