"""Blobs as oneDNN's batch normalisation sees them, and what BatchNorm, Scale and Bias build on: y = x scale + shift, and sums by channel."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd, prod
from typing import NamedTuple

import numpy as np

from caffelite.backends.contract import Array, is_usual
from caffelite.backends.onednn.dnnl import (
    BFLOAT16,
    DST,
    FLOAT32,
    INFERENCE,
    MEAN,
    SCALE,
    SHIFT,
    SRC,
    TYPES,
    USE_GLOBAL_STATISTICS,
    USE_SCALE,
    USE_SHIFT,
    VARIANCE,
    Descriptor,
    Dnnl,
    Primitive,
    Unsupported,
)
from caffelite.backends.onednn.plan import PlanningBackend, Run, signature

LANES = 16  # oneDNN's quick kernels want a multiple of so many channels
IMAGE = 1 << 17  # elements; larger images count as several, because oneDNN hands whole images to its threads
PIECE_BYTES = 1 << 24  # of a blob that is summed, at a time: what the primitive writes besides stays in the last-level cache
PIECE_ROWS = 1 << 15  # cells summed in float32: with a million of them a mean of 1000 comes out 4 deviations off


class Layout(NamedTuple):
    """A channels-last blob as (images or parts of them, width, 1, cells). width: the channels, or where they are no multiple of
    LANES, those of `fold` neighbouring cells; each channel then has `fold` places in vectors over the channels."""

    images: int
    width: int
    cells: int
    dtype: int
    fold: int

    def describe(self, dnnl: Dnnl, images: int | None = None) -> Descriptor:
        """All of the blob, or so many images of it."""
        image = self.cells * self.width
        return dnnl.strided((images or self.images, self.width, 1, self.cells), (image, 1, image, self.width), self.dtype)


def layout(*blobs: Array) -> Layout:
    """What blobs of one shape and type have in common. Unsupported where NumPy is as quick: C order, and channels that do not fold."""
    x = blobs[0]
    if x.dtype not in (FLOAT32, BFLOAT16) or any(z.dtype != x.dtype or z.shape != x.shape for z in blobs):
        raise Unsupported("not blobs of one shape and type")
    if x.ndim not in (2, 4) or not prod(x.shape) or not all(is_usual(z) for z in blobs):
        raise Unsupported("not rows of channels")
    images, channels, cells = len(x), x.shape[1], prod(x.shape[2:])
    fold = LANES // gcd(channels, LANES)
    if cells % fold:
        images, cells = 1, images * cells
    if cells % fold:
        raise Unsupported("odd channels")
    width, cells = channels * fold, cells // fold
    split = next((n for n in range(1, cells) if cells % n == 0 and cells // n * width <= IMAGE), cells)
    return Layout(images * split, width, cells // split, TYPES[x.dtype], fold)


def vector(values: Array, fold: int = 1) -> Array:
    """A contiguous float32 vector over the channels, `fold` times in a row."""
    flat = np.ascontiguousarray(values, FLOAT32).reshape(-1)
    return flat if fold == 1 else np.tile(flat, fold)


def is_per_channel(operand: Array, x: Array) -> bool:
    """The operand broadcasts over all axes of x but axis 1."""
    return x.ndim >= 2 and tuple(operand.shape) == (1, x.shape[1], *(1,) * (x.ndim - 2))


def plan_affine(dnnl: Dnnl, x: Array, y: Array) -> Run:
    """y = x scale + shift from the addresses of x and y and two vectors: batch normalisation of mean 0, variance 1 and eps 0."""
    seen, flags = layout(x, y), USE_GLOBAL_STATISTICS | USE_SCALE | USE_SHIFT
    blob = seen.describe(dnnl)
    descriptor = dnnl.primitive_descriptor("batch_normalization_forward", INFERENCE, blob, blob, 0.0, flags, dnnl.plain)
    unit = {MEAN: np.zeros(seen.width, FLOAT32), VARIANCE: np.ones(seen.width, FLOAT32)}
    run = Primitive(dnnl, descriptor, (SRC, SCALE, SHIFT, DST), unit)

    def affine(x: int, y: int, scale: Array, shift: Array) -> None:
        scale, shift = vector(scale, seen.fold), vector(shift, seen.fold)
        run(x, scale.ctypes.data, shift.ctypes.data, y)

    return affine


class Pieces:
    """Runs a primitive that makes vectors over the channels on a few images at a time.

    make(images): the primitive for so many images, over the addresses of the inputs, of scratch as large as one of them, and of
    `vectors` vectors. Called with the inputs' addresses it gives, for each vector, an array (parts, channels), to be summed by the
    caller; `weights` says which share of the blob each part stands for."""

    def __init__(self, dnnl: Dnnl, seen: Layout, itemsize: int, threads: int, make: Callable[[int], Primitive], vectors: int) -> None:
        count, self._image = seen.images, seen.cells * seen.width * itemsize
        images = min(count, max(threads, min(PIECE_BYTES // self._image, PIECE_ROWS // seen.cells)))
        self._sizes = [min(images, count - start) for start in range(0, count, images)]
        self._runs = {size: make(size) for size in set(self._sizes)}
        self._scratch, self._scratch_bytes = dnnl.scratch, images * self._image
        self._made = np.empty((vectors, len(self._sizes), seen.width), FLOAT32)
        self._channels = seen.width // seen.fold
        self.weights = np.repeat(np.array(self._sizes) / (count * seen.fold), seen.fold)

    def __call__(self, *inputs: int) -> list[Array]:
        unused, made = self._scratch.address("output", self._scratch_bytes), self._made.ctypes.data
        every, each = self._made.strides[:2]
        offset = 0
        for i, size in enumerate(self._sizes):
            self._runs[size](*(x + offset for x in inputs), unused, *(made + every * v + each * i for v in range(len(self._made))))
            offset += size * self._image
        return [parts.reshape(-1, self._channels) for parts in self._made.astype(np.float64)]


class ChannelOps(PlanningBackend):
    """The arithmetic that normalising, Scale and Bias share."""

    def _affine(self, x: Array, y: Array, scale: Array | float, shift: Array | float) -> bool:
        """y = x scale + shift, each a vector over the channels or one number; False where NumPy has to do it."""
        plan = self.plan(("affine", signature(x), signature(y)), lambda: plan_affine(self.dnnl, x, y))
        if plan is None:
            return False
        channels = x.shape[1]
        scale, shift = (np.full(channels, z, FLOAT32) if isinstance(z, float) else z for z in (scale, shift))
        plan(x.ctypes.data, y.ctypes.data, scale, shift)
        return True
