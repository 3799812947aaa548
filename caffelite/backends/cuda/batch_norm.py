"""Batch normalisation over axis 1: kernels/batch_norm.cu, and kernels/batch_norm_scale.cu with the Scale and ReLU that follow."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import numpy as np

from caffelite.backends.contract import Array
from caffelite.backends.cuda.common import MOST_BLOCKS, THREADS, WARP, Base, blocks, cname
from caffelite.backends.cuda.launch import Module
from caffelite.errors import BackendError

RULES = ("FORWARD", "BACKWARD", "GLOBAL")
RUNS = ("float, 4", "float, 1", "bf16, 8", "bf16, 1")  # element type and channels to a thread

BATCH_NORM = Module(
    "batch_norm",
    [
        *(f"{kernel}<{run}>" for run in RUNS for kernel in ("matrix_moments", "matrix_sums")),
        *(f"{kernel}<{kind}>" for kind in ("float", "bf16") for kernel in ("plane_moments", "plane_sums")),
        "accumulate",
        "global_statistics",
        "channel_moments",
        "channel_means",
        *(f"matrix_pass<{run}, {rule}>" for run in RUNS for rule in RULES),
        *(f"plane_pass<{kind}, {rule}>" for kind in ("float", "bf16") for rule in RULES),
    ],
)
BATCH_NORM_SCALE = Module(
    "batch_norm_scale",
    [*(f"{kernel}<{run}>" for run in RUNS for kernel in ("matrix_scale", "matrix_scale_sums", "matrix_scale_pass")), "channel_scale_sums"],
)
SUM_BLOCKS = 512  # of all channels: enough to fill a large GPU, few enough for a short second pass
PASS_BLOCKS = 4096  # few enough that reading a channel's parameters stays small beside its pixels
LEAST = 4  # pixels to a thread, where that leaves fewer blocks


class Matrix(NamedTuple):
    """How blocks share a matrix (pixels, channels): `groups` blocks side by side, `columns` runs of `run` channels wide and `rows` pixels high."""

    pixels: int
    channels: int
    run: int
    groups: int
    columns: int
    rows: int

    def slabs(self, most: int) -> tuple[int, int]:
        """How many slabs the pixels are cut into, and the pixels of a slab: at most `most` blocks, each thread with LEAST pixels or more."""
        count = max(1, min(most // self.groups, self.pixels // (self.rows * LEAST)))
        slab = -(-self.pixels // (count * self.rows)) * self.rows
        return -(-self.pixels // slab), slab


class BatchNorm(Base):
    def batch_norm_statistics(self, x: Array, mean: Array, variance: Array) -> None:
        partial = self.scratch(_partial_bytes(x))
        slabs, slab = self._slabs("moments", partial, x)
        sizes = (np.int32(slabs), np.int32(x.shape[1]), np.float64(x.size // x.shape[1]), np.int64(slab))
        self.launch(BATCH_NORM, "channel_moments", _warps(x), THREADS, partial, *sizes, mean, variance)

    def batch_norm_accumulate(
        self,
        mean: Array,
        variance: Array,
        mean_sum: Array,
        variance_sum: Array,
        weight: Array,
        skip: Array | None = None,
        *,
        fraction: float,
        correction: float,
    ) -> None:
        numbers = (np.float32(fraction), np.float32(correction), np.int32(mean.size))
        self.launch(BATCH_NORM, "accumulate", blocks(mean.size), THREADS, mean, variance, mean_sum, variance_sum, weight, skip, *numbers)

    def batch_norm_global_statistics(self, mean_sum: Array, variance_sum: Array, weight: Array, mean: Array, variance: Array) -> None:
        self.launch(BATCH_NORM, "global_statistics", blocks(mean.size), THREADS, mean_sum, variance_sum, weight, mean, variance, np.int32(mean.size))

    def batch_norm_forward(self, x: Array, mean: Array, variance: Array, y: Array, *, eps: float) -> None:
        self._pass("FORWARD", x, None, mean, None, variance, y, eps)

    def batch_norm_backward(self, y: Array, variance: Array, dy: Array, dx: Array, *, eps: float) -> None:
        channels, used = y.shape[1], _partial_bytes(y)
        scratch = self.scratch(used + 8 * channels)
        mean, product = (self.part(scratch, used + i * 4 * channels, (channels,), "float32") for i in range(2))
        slabs, _ = self._slabs("sums", scratch, dy, y)
        sizes = (np.int32(slabs), np.int32(channels), np.float64(y.size // channels))
        self.launch(BATCH_NORM, "channel_means", _warps(y), THREADS, scratch, *sizes, mean, product)
        self._pass("BACKWARD", dy, y, mean, product, variance, dx, eps)

    def batch_norm_backward_global(self, variance: Array, dy: Array, dx: Array, *, eps: float) -> None:
        self._pass("GLOBAL", dy, None, None, None, variance, dx, eps)

    def batch_norm_scale_forward(self, x: Array, mean: Array, variance: Array, s: Array, b: Array, y: Array, *, eps: float, relu: bool) -> None:
        matrix, given = _rows(x), (mean, variance, s, b, np.float32(eps), np.bool_(relu))
        name, grid, sizes = _matrix_run("matrix_scale", matrix, PASS_BLOCKS, x, y)
        self.launch(BATCH_NORM_SCALE, name, grid, THREADS, x, *given, y, *sizes)

    def batch_norm_scale_backward(
        self,
        x: Array,
        y: Array,
        mean: Array,
        variance: Array,
        s: Array,
        b: Array,
        dy: Array,
        dx: Array,
        ds: Array | None,
        db: Array | None,
        *,
        eps: float,
        relu: bool,
        fixed: bool,
        accumulate_s: bool,
        accumulate_b: bool,
    ) -> None:
        channels, used, matrix = x.shape[1], _partial_bytes(x), _rows(x)
        given = (mean, variance, s, b, np.float32(eps), np.bool_(relu))
        means: tuple[Array | None, ...] = (None, None)
        if not fixed or ds is not None or db is not None:
            scratch = self.scratch(used + 8 * channels)
            means = tuple(self.part(scratch, used + i * 4 * channels, (channels,), "float32") for i in range(2))
            name, grid, sizes = _matrix_run("matrix_scale_sums", matrix, SUM_BLOCKS, x, dy)
            self.launch(BATCH_NORM_SCALE, name, grid, THREADS, x, dy, *given, scratch, *sizes)
            counts = (np.int32(grid[1]), np.int32(channels), np.float64(matrix.pixels))
            flags = (np.bool_(accumulate_s), np.bool_(accumulate_b))
            self.launch(BATCH_NORM_SCALE, "channel_scale_sums", _warps(x), THREADS, scratch, *counts, ds, db, *flags, *means)
        name, grid, sizes = _matrix_run("matrix_scale_pass", matrix, PASS_BLOCKS, x, dy, dx)
        self.launch(BATCH_NORM_SCALE, name, grid, THREADS, x, dy, *given, *((None, None) if fixed else means), dx, *sizes)

    def _slabs(self, what: str, partial: Array, *arrays: Array) -> tuple[int, int]:
        """partial <- the moments or sums of the channels in each slab; returns how many slabs there are, and their size."""
        x, kind, matrix, channels = arrays[0], _kind(*arrays), _matrix(arrays[0]), arrays[0].shape[1]
        if matrix:
            name, grid, sizes = _matrix_run(f"matrix_{what}", matrix, SUM_BLOCKS, *arrays)
            self.launch(BATCH_NORM, name, grid, THREADS, *arrays, partial, *sizes)
            return grid[1], int(sizes[-1])
        slabs, slab = _plane_slabs(x)
        sizes = (np.int64(x.size // channels), np.int32(channels), np.int64(prod(x.shape[2:])), np.int64(slab))
        self.launch(BATCH_NORM, f"plane_{what}<{kind}>", (channels, slabs), THREADS, *arrays, partial, *sizes)
        return slabs, slab

    def _pass(self, rule: str, x: Array, y: Array | None, mean: Array | None, product: Array | None, variance: Array, out: Array, eps: float) -> None:
        kind, matrix, channels = _kind(x, y, out), _matrix(x), np.int32(x.shape[1])
        given = (x, y, mean, product, variance, np.float32(eps), out)
        if matrix:
            slabs, slab = matrix.slabs(PASS_BLOCKS)
            name, sizes = f"matrix_pass<{kind}, {matrix.run}, {rule}>", (np.int64(matrix.pixels), channels, np.int32(matrix.columns), np.int64(slab))
            self.launch(BATCH_NORM, name, (matrix.groups, slabs), THREADS, *given, *sizes)
        else:
            planes = x.shape[0] * x.shape[1]
            grid = min(planes, MOST_BLOCKS)
            self.launch(BATCH_NORM, f"plane_pass<{kind}, {rule}>", grid, THREADS, *given, np.int64(planes), channels, np.int64(prod(x.shape[2:])))


def _kind(x: Array, *others: Array | None) -> str:
    """The C++ type of all arrays. BackendError when they differ: activations of one net have one type."""
    for other in others:
        if other is not None and other.dtype != x.dtype:
            raise BackendError(f"batch normalisation of {x.dtype} together with {other.dtype}", hint="give arrays of one type")
    return cname(x)


def _matrix(x: Array) -> Matrix | None:
    """x as a matrix of pixels and channels; None where the channels are not last in memory."""
    channels, pixels = x.shape[1], x.size // x.shape[1]
    if x.ndim != 4 and prod(x.shape[2:]) != 1:
        return None
    vector = 16 // int(x.itemsize)
    run = vector if channels % vector == 0 else 1
    groups = -(-channels // (run * WARP))
    columns = -(-channels // (run * groups))
    return Matrix(pixels, channels, run, groups, columns, THREADS // columns)


def _rows(x: Array) -> Matrix:
    """x as a matrix. BackendError for other than 2 or 4 axes, which the graph does not ask for."""
    matrix = _matrix(x)
    if matrix is None:
        raise BackendError(f"batch normalisation with a scale takes 2 or 4 axes, found shape {x.shape}", hint="use BatchNorm and Scale one by one")
    return matrix


def _matrix_run(kernel: str, matrix: Matrix, most: int, *arrays: Array) -> tuple[str, tuple[int, int], tuple[np.generic, ...]]:
    """Name, grid and last arguments of a kernel over the pixels of `arrays`, in at most `most` blocks."""
    slabs, slab = matrix.slabs(most)
    sizes = (np.int64(matrix.pixels), np.int32(matrix.channels), np.int32(matrix.columns), np.int64(slab))
    return f"{kernel}<{_kind(*arrays)}, {matrix.run}>", (matrix.groups, slabs), sizes


def _warps(x: Array) -> int:
    """Blocks that hold a warp for each channel."""
    return -(-int(x.shape[1]) * WARP // THREADS)


def _plane_slabs(x: Array) -> tuple[int, int]:
    """How many slabs a channel's elements are cut into, and their size, where channels are not last in memory."""
    count = int(x.size // x.shape[1])
    slabs = max(1, min(SUM_BLOCKS // x.shape[1], count // (THREADS * LEAST)))
    slab = -(-count // slabs)
    return -(-count // slab), slab


def _partial_bytes(x: Array) -> int:
    """Two doubles to a channel and slab, at the most slabs that there are: a block of SUM_BLOCKS holds up to THREADS channels."""
    channels = int(x.shape[1])
    return 16 * max(channels, min(channels, THREADS) * SUM_BLOCKS)
