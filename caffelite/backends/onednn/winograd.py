"""Winograd's filters: n = tile + kernel - 1 products give `tile` outputs of a one-dimensional filter, which plainly takes tile x kernel.

With a window d of n inputs and a filter g of `kernel` weights, y = A ((G g) * (B d)), * element by element (S. Winograd, Arithmetic Complexity of
Computations, 1980; A. Lavin and S. Gray, Fast Algorithms for Convolutional Neural Networks, 2016). The product of the polynomials g and y' is found
from its values at n - 1 points and at infinity; transposed, that is the filter. Since y is linear in d and in g, the gradient of a filter is
dg = G^T ((A^T dy) * (B d)), and that of the data is a filter again, with the weights in reverse.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from math import log2
from typing import NamedTuple

import numpy as np

from caffelite.backends.contract import Array

# For n terms. Small numbers with small quotients: rounding grows with the powers of points and with the inverses of their differences. Among such
# sets, those with the least error for kernels of 3 and 5 in a random search.
POINTS = {
    4: "0 1 -1",
    5: "0 1 -1 1/2",
    6: "0 1 -1 1/2 -2",
    7: "0 1 -1 2 -2 1/2",
    8: "0 1 -1 2 -2 1/2 -1/2",
    9: "0 1 -1 2 -2 3/5 -3/5 -1/3",
    10: "0 1 -1 2 -2 3/4 -3/4 2/5 -2/5",
}


class Filter(NamedTuple):
    """The matrices, in float64: a (tile, n), g (n, kernel), b (n, n)."""

    a: Array
    g: Array
    b: Array


@cache
def filter_of(tile: int, kernel: int) -> Filter:
    """Of tiles of `tile` outputs and filters of `kernel` weights. KeyError: no points are known for their n."""
    n = tile + kernel - 1
    points = tuple(Fraction(p) for p in POINTS[n].split())
    a, g = _powers(points, tile).T.copy(), _powers(points, kernel)
    b = np.array([[float(c) for c in row] for row in _interpolation(points)])
    for i in range(n):  # the three share what their rows weigh, by powers of 2, which round nothing
        weights = [float(np.linalg.norm(v)) for v in (a[:, i], g[i], b[i])]
        common = float(np.prod(weights)) ** (1 / 3)
        of_g, of_b = (2.0 ** round(log2(common / w)) for w in weights[1:])
        g[i] *= of_g
        b[i] *= of_b
        a[:, i] /= of_g * of_b
    return Filter(a, g, b)


def _powers(points: tuple[Fraction, ...], count: int) -> Array:
    """Row i: the powers 0..count-1 of point i; the last row, for infinity, takes the highest coefficient alone."""
    rows = [[float(p**k) for k in range(count)] for p in points]
    return np.array([*rows, [0.0] * (count - 1) + [1.0]])


def _interpolation(points: tuple[Fraction, ...]) -> list[list[Fraction]]:
    """Row i: the coefficients of the polynomial that is 1 at point i and 0 at the others; the last row, of the one that is 0 at all."""
    rows = []
    for i, p in enumerate(points):
        row, scale = [Fraction(1)], Fraction(1)
        for k, q in enumerate(points):
            if k != i:
                row, scale = _times(row, q), scale * (p - q)
        rows.append([c / scale for c in row] + [Fraction(0)])
    whole = [Fraction(1)]
    for q in points:
        whole = _times(whole, q)
    return [*rows, whole]


def _times(polynomial: list[Fraction], root: Fraction) -> list[Fraction]:
    """polynomial times (z - root)."""
    return [low - root * high for low, high in zip([Fraction(0), *polynomial], [*polynomial, Fraction(0)])]


def best_tile(outputs: int, kernel: int, most: int) -> int:
    """The tile that takes the fewest products with at most `most` terms; of equals the smallest, which rounds least."""
    tiles = [n + 1 - kernel for n in POINTS if kernel < n <= most]
    return min(tiles, key=lambda tile: (-(-outputs // tile) * (tile + kernel - 1), tile))


class Axis:
    """One axis of a convolution of stride 1, its outputs cut into tiles; what lies outside of the axis counts as 0.

    size, outputs: lengths of input and output. pad: zeros before the first input. most: how many terms a tile may have.
    The last tile may hold fewer outputs."""

    def __init__(self, size: int, outputs: int, pad: int, kernel: int, most: int) -> None:
        tile = best_tile(outputs, kernel, most)
        self.size, self.outputs, self.pad, self.kernel, self.tile = size, outputs, pad, kernel, tile
        self.filter = filter_of(tile, kernel)
        self.n, self.tiles = tile + kernel - 1, -(-outputs // tile)

    def windows(self) -> Array:
        """(n, tiles, size) float32: takes inputs to B d for each tile's window d."""
        made = np.zeros((self.n, self.tiles, self.size), np.float32)
        for t in range(self.tiles):
            first = t * self.tile - self.pad
            for i in range(max(0, -first), min(self.n, self.size - first)):
                made[:, t, first + i] = self.filter.b[:, i]
        return made

    def results(self) -> Array:
        """(n, tiles, outputs) float32: takes terms to outputs, by sums over both, and gradients of outputs to A^T dy for each tile's dy."""
        made = np.zeros((self.n, self.tiles, self.outputs), np.float32)
        for t in range(self.tiles):
            for i in range(min(self.tile, self.outputs - t * self.tile)):
                made[:, t, t * self.tile + i] = self.filter.a[i]
        return made

    def weights(self, *, reverse: bool = False) -> Array:
        """(n, 1, kernel) float32: takes the weights of a filter to G g; reverse: of the filter that takes gradients back to the data."""
        return self.filter.g[:, None, :: -1 if reverse else 1].astype(np.float32)
