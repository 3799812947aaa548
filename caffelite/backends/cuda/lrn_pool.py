"""Normalisation across channels and max pooling in one pass each way: kernels/lrn_pool.cu; where it does not fit, one after the other."""

from __future__ import annotations

import numpy as np

from caffelite.backends.contract import Array, Ints, pool_mask_dtype
from caffelite.backends.cuda.channels import MOST_IMAGES, tiles, vector_of
from caffelite.backends.cuda.common import DTYPES, THREADS, cname
from caffelite.backends.cuda.launch import TYPES, Module
from caffelite.backends.cuda.lrn import NEAR, Lrn, across
from caffelite.backends.cuda.pooling import STRIDES, Pooling, known, windows
from caffelite.backends.cuda.space import Space

MOST_SHARED = 24 * 1024  # bytes of normalised pixels that a block keeps
MOST_GROUPS = 16  # of V channels in a block of forward: 256 bytes of a pixel
VECTOR = 16  # bytes of a group
FORWARD = [f"lrn_max_pool_forward<{kind}, unsigned char, {size // 2}>" for kind in TYPES for size in NEAR]
BACKWARD = [f"lrn_max_pool_backward<{kind}, unsigned char, {size // 2}, {s}>" for kind in TYPES for size in NEAR for s in (0, *STRIDES)]
LRN_POOL = Module("lrn_pool", [*FORWARD, *BACKWARD])


class LrnPool(Pooling, Lrn):
    def lrn_max_pool_pays(self, shape: Ints, dtype: str, *, size: int, kernel: Ints, stride: Ints) -> bool:
        vector = VECTOR // DTYPES[dtype].itemsize
        fits = shape[1] % vector == 0 and shape[1] <= vector * THREADS and pool_mask_dtype(kernel) == "uint8"
        return fits and size in NEAR and _bytes(1, kernel, stride, min(shape[1] // vector, MOST_GROUPS)) <= MOST_SHARED

    def lrn_max_pool_forward(
        self, x: Array, y: Array, mask: Array | None, *, size: int, alpha: float, beta: float, k: float, kernel: Ints, stride: Ints, pad: Ints
    ) -> None:
        vector = vector_of(x, y, mask)
        groups = min(x.shape[1] // vector, MOST_GROUPS)
        side = _side(y.shape[2:], kernel, stride, groups)
        if size not in NEAR or vector == 1 or not side or (mask is not None and cname(mask) != "unsigned char"):
            normalised = Space(self, "lrn pool", y=x.size * x.itemsize).part("y", x.dtype, x.shape)
            self.lrn_forward(x, normalised, None, size=size, alpha=alpha, beta=beta, k=k)
            self.max_pool_forward(normalised, y, mask, kernel=kernel, stride=stride, pad=pad)
            return
        blocks = -(-y.shape[2] // side) * -(-y.shape[3] // side) * -(-x.shape[1] // (vector * groups))
        grid, block = (blocks, min(y.shape[0], MOST_IMAGES)), (groups, THREADS // groups)
        numbers = (across(x.shape, size, alpha, beta, k), windows(x.shape, y.shape, kernel, stride, pad), np.int32(side))
        name, shared = f"lrn_max_pool_forward<{cname(x)}, unsigned char, {size // 2}>", _bytes(side, kernel, stride, groups)
        self.launch(LRN_POOL, name, grid, block, x, y, mask, *numbers, shared=shared)

    def lrn_max_pool_backward(
        self,
        x: Array,
        dy: Array,
        mask: Array,
        dx: Array,
        *,
        size: int,
        alpha: float,
        beta: float,
        k: float,
        kernel: Ints,
        stride: Ints,
        pad: Ints,
        relu: bool = False,
    ) -> None:
        vector = vector_of(x, dy, mask, dx)
        if size not in NEAR or vector == 1 or x.shape[1] > vector * THREADS or cname(mask) != "unsigned char":
            space = Space(self, "lrn pool", y=x.size * x.itemsize, dy=x.size * x.itemsize)
            y, between = (space.part(name, x.dtype, x.shape) for name in ("y", "dy"))
            self.lrn_forward(x, y, None, size=size, alpha=alpha, beta=beta, k=k)
            self.max_pool_backward(dy, mask, between, kernel=kernel, stride=stride, pad=pad)
            self.lrn_backward(x, y, between, dx, None, size=size, alpha=alpha, beta=beta, k=k, relu=relu)
            return
        name = f"lrn_max_pool_backward<{cname(x)}, unsigned char, {size // 2}, {known(stride, STRIDES)}>"
        numbers = (across(x.shape, size, alpha, beta, k), windows(x.shape, dy.shape, kernel, stride, pad), np.bool_(relu))
        self.launch(LRN_POOL, name, *tiles(x, vector), x, dy, mask, dx, *numbers)


def _bytes(side: int, kernel: Ints, stride: Ints, groups: int) -> int:
    """Shared memory for the pixels in the windows of side x side outputs."""
    rows, columns = ((side - 1) * step + extent for step, extent in zip(stride, kernel))
    return rows * columns * groups * VECTOR


def _side(out: Ints, kernel: Ints, stride: Ints, groups: int) -> int:
    """The most outputs along a side of a block's tile; 0 where no window fits into shared memory."""
    side = 0
    while side < max(out) and _bytes(side + 1, kernel, stride, groups) <= MOST_SHARED:
        side += 1
    return side
