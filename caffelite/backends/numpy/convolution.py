"""Convolution over any number of spatial axes: windows are gathered with the channels last, then multiplied as a matrix.

Images are taken a few at a time, so that the gathered windows never need more than about COLUMN_BYTES.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod

import numpy as np

from caffelite.backends.contract import Array, Drop, Ints
from caffelite.backends.numpy.common import channels_last, column_sums, multiplied, rows, store, store_gradient, taken_on, widen, work_type
from caffelite.backends.numpy.dropout import Dropout

COLUMN_BYTES = 16 << 20


class Convolution(Dropout):  # which a product does after it where asked to
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
        work = work_type(x, w)
        out, kernel = y.shape[2:], w.shape[2:]
        for part, filters in _groups(x.shape[1], w, group):
            # Products are added channel by channel, then over the kernel's cells, as in Caffe: a sum in another order rounds
            # differently, and a max pooling that follows may then choose another of two nearly equal values.
            weights = w[filters].astype(work, copy=False).reshape(-1, prod(w.shape[1:]))
            for images in _image_chunks(x[:, part], out, kernel):
                windows = _windows(_padded(x[images, part], pad, work), out, kernel, stride, dilation)
                columns = np.moveaxis(windows, -1, 1 + len(out)).reshape(-1, weights.shape[1])
                values = multiplied(columns, weights.T)
                if b is not None:
                    values += b[filters].astype(work, copy=False)
                if relu:
                    np.maximum(values, 0, out=values)
                store(channels_last(y[images, filters]), values.reshape(-1, *out, weights.shape[0]))
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
        work = work_type(dy, w)
        out, kernel, size = dy.shape[2:], w.shape[2:], dx.shape[2:]
        for part, filters in _groups(dx.shape[1], w, group):
            weights = channels_last(w[filters]).astype(work, copy=False).reshape(-1, prod(w.shape[1:]))
            for images in _image_chunks(dx[:, part], out, kernel):
                gradient = rows(dy[images, filters]).astype(work, copy=False)
                columns = multiplied(gradient, weights).reshape(-1, *out, *kernel, w.shape[1])
                padded = np.zeros((columns.shape[0], *(s + 2 * p for s, p in zip(size, pad)), w.shape[1]), work)
                for cell in product(*(range(k) for k in kernel)):
                    places = (slice(c * d, c * d + (o - 1) * s + 1, s) for c, d, o, s in zip(cell, dilation, out, stride))
                    padded[(slice(None), *places)] += columns[(slice(None),) * (1 + len(out)) + cell]
                inner = tuple(slice(p, p + s) for s, p in zip(size, pad))
                found = padded[(slice(None), *inner)]
                above = None if positive is None else channels_last(positive[images, part])
                store(channels_last(dx[images, part]), taken_on(found, above, ratio, dx.dtype))

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
        if db is not None:
            store_gradient(db, column_sums(rows(widen(dy)[0])), accumulate_b)
        if dw is None:
            return
        work = work_type(x, dy)
        out, kernel = dy.shape[2:], dw.shape[2:]
        for part, filters in _groups(x.shape[1], dw, group):
            total = np.zeros((dw.shape[0] // group, prod(dw.shape[1:])), work)
            for images in _image_chunks(x[:, part], out, kernel):
                columns = _windows(_padded(x[images, part], pad, work), out, kernel, stride, dilation).reshape(-1, total.shape[1])
                total += multiplied(rows(dy[images, filters]).astype(work, copy=False).T, columns)
            store_gradient(channels_last(dw[filters]), total.reshape(-1, *kernel, dw.shape[1]), accumulate_w)


def _groups(channels: int, w: Array, group: int) -> Iterator[tuple[slice, slice]]:
    """For each group its input channels and its filters."""
    each, filters_each = channels // group, w.shape[0] // group
    for g in range(group):
        yield slice(g * each, (g + 1) * each), slice(g * filters_each, (g + 1) * filters_each)


def _image_chunks(x: Array, out: Ints, kernel: Ints) -> Iterator[slice]:
    """Runs of images whose gathered windows fit COLUMN_BYTES; at least one image each."""
    bytes_each = prod(out) * prod(kernel) * x.shape[1] * 4
    step = max(1, COLUMN_BYTES // max(bytes_each, 1))
    for start in range(0, x.shape[0], step):
        yield slice(start, min(start + step, x.shape[0]))


def _padded(x: Array, pad: Ints, work: np.dtype[np.generic]) -> Array:
    """(N,C,*in) as (N,*in with zeros around it,C)."""
    last = channels_last(x)
    if not any(pad):
        return last.astype(work, copy=False)
    padded = np.zeros((last.shape[0], *(s + 2 * p for s, p in zip(last.shape[1:-1], pad)), last.shape[-1]), work)
    padded[(slice(None), *(slice(p, p + s) for s, p in zip(last.shape[1:-1], pad)))] = last
    return padded


def _windows(padded: Array, out: Ints, kernel: Ints, stride: Ints, dilation: Ints) -> Array:
    """A view (N,*out,*kernel,C) of all windows."""
    first, *spatial, last = padded.strides
    steps = (first, *(b * s for b, s in zip(spatial, stride)), *(b * d for b, d in zip(spatial, dilation)), last)
    return np.lib.stride_tricks.as_strided(padded, (padded.shape[0], *out, *kernel, padded.shape[-1]), steps, writeable=False)
