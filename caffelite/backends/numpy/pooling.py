"""Max and average pooling: one pass over the output for each cell of the window, vectorised over images and channels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from caffelite.backends.contract import Array, Ints
from caffelite.backends.numpy.common import FLOAT_MAX, Base, rectified, store, widen, work_type


class Cell(NamedTuple):
    """One cell of the window: its number, the outputs whose cell lies in the image, and the image's pixels there."""

    number: int
    outputs: tuple[slice, ...]
    inputs: tuple[slice, ...]


class Pooling(Base):
    def max_pool_forward(self, x: Array, y: Array, mask: Array | None, *, kernel: Ints, stride: Ints, pad: Ints) -> None:
        (values,) = widen(x)
        best = np.full_like(y, -FLOAT_MAX, values.dtype)
        if mask is not None:
            mask.fill(no_winner(mask))
        for cell in _cells(x.shape[2:], y.shape[2:], kernel, stride, pad):
            candidates = values[cell.inputs]
            wins = candidates > best[cell.outputs]
            np.fmax(best[cell.outputs], candidates, out=best[cell.outputs])  # NaN loses
            if mask is not None:
                # mask = number where wins; wrapping arithmetic is several times quicker than a masked copy
                mask[cell.outputs] += wins * (mask.dtype.type(cell.number) - mask[cell.outputs])
        store(y, best)

    def max_pool_backward(self, dy: Array, mask: Array, dx: Array, positive: Array | None = None, *, kernel: Ints, stride: Ints, pad: Ints) -> None:
        gradient = rectified(widen(dy)[0], positive)
        total = np.zeros_like(dx, gradient.dtype)
        for cell in _cells(dx.shape[2:], dy.shape[2:], kernel, stride, pad):
            total[cell.inputs] += np.where(mask[cell.outputs] == cell.number, gradient[cell.outputs], gradient.dtype.type(0))
        store(dx, total)

    def max_pool_indices(self, mask: Array, top: Array, *, kernel: Ints, stride: Ints, pad: Ints, width: int) -> None:
        first = [np.arange(extent) * step - before for extent, step, before in zip(mask.shape[2:], stride, pad)]
        winner = mask.astype(np.int64)
        h = first[0][:, None] + winner // kernel[1]
        w = first[1] + winner % kernel[1]
        store(top, np.where(mask == no_winner(mask), -1, h * width + w))

    def ave_pool_forward(self, x: Array, y: Array, *, kernel: Ints, stride: Ints, pad: Ints) -> None:
        (values,) = widen(x)
        total = np.zeros_like(y, values.dtype)
        for cell in _cells(x.shape[2:], y.shape[2:], kernel, stride, pad):
            total[cell.outputs] += values[cell.inputs]
        total /= _areas(x.shape[2:], y.shape[2:], kernel, stride, pad, values.dtype)
        store(y, total)

    def ave_pool_backward(self, dy: Array, dx: Array, positive: Array | None = None, *, kernel: Ints, stride: Ints, pad: Ints) -> None:
        share = widen(dy)[0] / _areas(dx.shape[2:], dy.shape[2:], kernel, stride, pad, work_type(dy))
        total = np.zeros_like(dx, share.dtype)
        for cell in _cells(dx.shape[2:], dy.shape[2:], kernel, stride, pad):
            total[cell.inputs] += share[cell.outputs]
        store(dx, rectified(total, positive))


def no_winner(mask: Array) -> int:
    """What a max-pooling mask says of a window without a winner."""
    return 255 if mask.dtype == np.uint8 else -1


def _cells(size: Ints, out: Ints, kernel: Ints, stride: Ints, pad: Ints) -> Iterator[Cell]:
    """The cells of the window in row-major order that lie in the image for at least one output."""
    everything = slice(None)
    for kh in range(kernel[0]):
        rows = _reach(kh - pad[0], size[0], out[0], stride[0])
        for kw in range(kernel[1]):
            columns = _reach(kw - pad[1], size[1], out[1], stride[1])
            if rows and columns:
                outputs, inputs = zip(rows, columns)
                yield Cell(kh * kernel[1] + kw, (everything, everything, *outputs), (everything, everything, *inputs))


def _reach(shift: int, size: int, out: int, stride: int) -> tuple[slice, slice] | None:
    """Along one axis: outputs p with 0 <= p*stride + shift < size, and those pixels; None if there are none."""
    first = max(0, -(shift // stride))  # the least p with p*stride >= -shift
    last = min(out - 1, (size - 1 - shift) // stride)
    if first > last:
        return None
    start = first * stride + shift
    return slice(first, last + 1), slice(start, start + (last - first) * stride + 1, stride)


def _areas(size: Ints, out: Ints, kernel: Ints, stride: Ints, pad: Ints, work: np.dtype[np.generic]) -> Array:
    """The window's area for each output, measured in the padded plane; 0 where the window starts at the plane's end."""
    extents = []
    for s, o, k, step, p in zip(size, out, kernel, stride, pad):
        start = np.arange(o) * step - p
        extents.append(np.minimum(start + k, s + p) - start)
    return np.multiply.outer(*extents).astype(work)
