"""The passes over memory around Winograd's products: each a matrix product along one axis, for which oneDNN has primitives. Float32."""

from __future__ import annotations

import numpy as np

from caffelite.backends.contract import Array, Ints
from caffelite.backends.onednn.dnnl import F32, Descriptor, Dnnl, Primitive
from caffelite.backends.onednn.matmul import product
from caffelite.backends.onednn.plan import Drain, Feed

TILES_AT_ONCE = 6  # more would multiply by more of the zeros between the windows


def matrices(dnnl: Dnnl, shape: Ints, strides: Ints | None = None) -> Descriptor:
    """Matrices along the last two axes; in C order unless strides (in elements) are given."""
    if strides is None:
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    return dnnl.strided(shape, strides, F32)


class Spread:
    """target[j, image, tile] = sum over i of matrix[j, tile, i] source[image, i]; all of them rows of `row` elements."""

    def __init__(self, dnnl: Dnnl, matrix: Array, images: int, row: int) -> None:
        n, tiles, size = matrix.shape
        self._parts: list[tuple[Primitive, Array, int, int]] = []
        for start in range(0, tiles, TILES_AT_ONCE):
            some = matrix[:, start : start + TILES_AT_ONCE]
            used = np.flatnonzero(some.any(axis=(0, 1)))
            some = np.ascontiguousarray(some[:, :, used[0] : used[-1] + 1])
            _, count, width = some.shape
            right = matrices(dnnl, (images, 1, width, row), (size * row, size * row, row, 1))
            made = matrices(dnnl, (images, n, count, row), (tiles * row, images * tiles * row, row, 1))
            multiply = product(dnnl, matrices(dnnl, (1, *some.shape)), right, None, made)
            self._parts.append((multiply, some, 4 * int(used[0]) * row, 4 * start * row))

    def __call__(self, source: int, target: int) -> None:
        for multiply, matrix, read, write in self._parts:
            multiply(matrix.ctypes.data, source + read, target + write)


class Gather:
    """target[image, tile's i-th] = sum over j of matrix[i, j] source[j, image, tile] (+ bias) (ReLU), or target += the sum; rows of `row` elements.

    The last tile may have room for fewer than all of its results."""

    def __init__(self, dnnl: Dnnl, matrix: Array, images: int, size: int, row: int, *, bias: bool = False, relu: bool = False, add: bool = False) -> None:
        tile, n = matrix.shape
        tiles, whole = -(-size // tile), size // tile
        self._matrix = np.ascontiguousarray(matrix, np.float32)
        self._parts: list[tuple[Primitive, int, int]] = []
        for start, count, held in ((0, whole, tile), (whole, tiles - whole, size - whole * tile)):
            if not count:
                continue
            right = matrices(dnnl, (images, count, n, row), (tiles * row, row, images * tiles * row, 1))
            made = matrices(dnnl, (images, count, held, row), (size * row, tile * row, row, 1))
            line = matrices(dnnl, (1, 1, 1, row)) if bias else None
            multiply = product(dnnl, matrices(dnnl, (1, 1, held, n)), right, line, made, relu=relu, add=add)
            self._parts.append((multiply, 4 * start * row, 4 * start * tile * row))

    def __call__(self, source: int, target: int, *bias: int) -> None:
        """bias: where the row that is added to each lies."""
        for multiply, read, write in self._parts:
            multiply(self._matrix.ctypes.data, source + read, *bias, target + write)


class Lines:
    """target[line] = matrix source[line] (+ bias) (ReLU), or target += the product: lines of pixels, each of `width` channels.

    matrix is (n, tiles, size): a line of `size` pixels becomes one of tiles x n terms, tile by tile; back: the other way round."""

    def __init__(
        self, dnnl: Dnnl, matrix: Array, lines: int, width: int, *, back: bool = False, bias: bool = False, relu: bool = False, add: bool = False
    ) -> None:
        flat = matrix.transpose(1, 0, 2).reshape(-1, matrix.shape[2])
        self._matrix = np.ascontiguousarray(flat.T if back else flat, np.float32)
        after, before = self._matrix.shape
        right, made = matrices(dnnl, (lines, before, width)), matrices(dnnl, (lines, after, width))
        line = matrices(dnnl, (1, 1, width)) if bias else None
        self._multiply = product(dnnl, matrices(dnnl, (1, after, before)), right, line, made, relu=relu, add=add)
        self.nbytes = made.nbytes

    def __call__(self, source: int, target: int, *bias: int) -> None:
        """bias: where that of the channels lies."""
        self._multiply(self._matrix.ctypes.data, source, *bias, target)


class Entry:
    """A piece of a blob as the filters along rows take it: as it lies, or in float32 with its lines spread by `matrix`."""

    def __init__(self, dnnl: Dnnl, dtype: int, lines: int, columns: int, channels: int, matrix: Array | None, purpose: str) -> None:
        held, wide = (dnnl.strided((lines * columns * channels,), (1,), t) for t in (dtype, F32))
        self.nbytes, self._purpose, self._scratch = held.nbytes, purpose, dnnl.scratch
        self._feed = Feed(dnnl, held, wide, purpose)
        self._spread = None if matrix is None else Lines(dnnl, matrix, lines, channels)

    def __call__(self, address: int) -> int:
        address = self._feed(address)
        if self._spread is None:
            return address
        made = self._scratch.address(f"{self._purpose} in columns", self._spread.nbytes)
        self._spread(address, made)
        return made


class Exit:
    """The other way: where the filters along rows shall write, and what becomes of it in the end."""

    def __init__(
        self, dnnl: Dnnl, dtype: int, lines: int, columns: int, channels: int, matrix: Array | None, *, bias: bool = False, relu: bool = False
    ) -> None:
        held, wide = (dnnl.strided((lines * columns * channels,), (1,), t) for t in (dtype, F32))
        self.nbytes, self._scratch = held.nbytes, dnnl.scratch
        self._drain = Drain(dnnl, wide, held, "output")
        self._gather = None if matrix is None else Lines(dnnl, matrix, lines, channels, back=True, bias=bias, relu=relu)
        self._held = 0 if matrix is None else 4 * lines * matrix.shape[0] * matrix.shape[1] * channels

    def target(self, address: int) -> int:
        return address if self._gather is None else self._scratch.address("output in columns", self._held)

    def finish(self, address: int, *bias: int) -> None:
        if self._gather is not None:
            self._gather(self.target(address), self._drain.target(address), *bias)
            self._drain.finish(address)
