"""Max and average pooling against loops over windows: stem pooling."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, floor
from typing import NamedTuple

import numpy as np
import pytest
from arrays import DTYPES, Shape, assert_close, last, numeric_gradient, pooled, rectified

from caffelite.backends.contract import pool_mask_dtype

LOWEST = {"float32": -3.4028234663852886e38, "bfloat16": -np.inf}  # -FLT_MAX as each type stores it


class Case(NamedTuple):
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    pad: tuple[int, int]
    rounding: Callable[[float], int] = ceil

    @property
    def out(self) -> Shape:
        return pooled(self.size, self.kernel, self.stride, self.pad, self.rounding)

    @property
    def options(self) -> dict[str, tuple[int, int]]:
        return {"kernel": self.kernel, "stride": self.stride, "pad": self.pad}


CASES = {
    "3x3 stride 2": Case((7, 7), (3, 3), (2, 2), (0, 0)),
    "windows beyond the edge": Case((6, 8), (3, 3), (2, 2), (0, 0)),
    "round down": Case((6, 8), (3, 3), (2, 2), (0, 0), floor),
    "padded": Case((4, 4), (3, 3), (2, 2), (1, 1)),
    "rectangular": Case((7, 11), (2, 5), (3, 1), (1, 2)),
    "gaps between windows": Case((11, 7), (2, 1), (3, 2), (0, 0)),
    "global": Case((5, 7), (5, 7), (1, 1), (0, 0)),
    "empty last window": Case((4, 4), (1, 1), (2, 2), (0, 0)),
    "wide window": Case((17, 19), (16, 16), (1, 2), (0, 0)),  # 256 cells: an int32 mask
}


def window(c: Case, i: int, j: int) -> list[tuple[int, int, int]]:
    """(number, h, w) of the cells of output (i,j) that lie in the image, row by row."""
    cells = []
    for number in range(c.kernel[0] * c.kernel[1]):
        h, w = i * c.stride[0] - c.pad[0] + number // c.kernel[1], j * c.stride[1] - c.pad[1] + number % c.kernel[1]
        if 0 <= h < c.size[0] and 0 <= w < c.size[1]:
            cells.append((number, h, w))
    return cells


def area(c: Case, i: int, j: int) -> int:
    start = [p * t - q for p, t, q in zip((i, j), c.stride, c.pad)]
    end = [min(a + k, s + q) for a, k, s, q in zip(start, c.kernel, c.size, c.pad)]
    return (end[0] - start[0]) * (end[1] - start[1])


def max_forward(c: Case, x: np.ndarray, lowest: float) -> tuple[np.ndarray, np.ndarray]:
    y, mask = np.full((*x.shape[:2], *c.out), lowest), np.full((*x.shape[:2], *c.out), -1)
    for n, ch, i, j in np.ndindex(y.shape):
        for number, h, w in window(c, i, j):
            if x[n, ch, h, w] > y[n, ch, i, j]:
                y[n, ch, i, j], mask[n, ch, i, j] = x[n, ch, h, w], number
    return y, mask


def max_backward(c: Case, dy: np.ndarray, mask: np.ndarray) -> np.ndarray:
    dx = np.zeros((*dy.shape[:2], *c.size))
    for n, ch, i, j in np.ndindex(dy.shape):
        for number, h, w in window(c, i, j):
            if number == mask[n, ch, i, j]:
                dx[n, ch, h, w] += dy[n, ch, i, j]
    return dx


def stored_mask(mask: np.ndarray, kernel: tuple[int, int]) -> np.ndarray:
    return np.where(mask < 0, 255, mask) if kernel[0] * kernel[1] <= 255 else mask


@pytest.mark.parametrize("layout", ["contract", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [5, 16])  # fast paths want multiples of 16
@pytest.mark.parametrize("name", CASES)
def test_max(backend, make, rng, name: str, channels: int, dtype: str, layout: str) -> None:
    c = CASES[name]
    x = make(rng.integers(-4, 4, (2, channels, *c.size)), dtype, layout)  # few values, so many ties
    mask_dtype = pool_mask_dtype(c.kernel)
    y, mask = make.empty((2, channels, *c.out), dtype, layout), make.empty((2, channels, *c.out), mask_dtype, layout)
    backend.max_pool_forward(x, y, mask, **c.options)
    want, winner = max_forward(c, make.host(x), LOWEST[dtype])
    np.testing.assert_array_equal(make.host(y), want)
    np.testing.assert_array_equal(make.host(mask), stored_mask(winner, c.kernel))
    y = make.empty(y.shape, dtype, layout)
    backend.max_pool_forward(x, y, None, **c.options)
    np.testing.assert_array_equal(make.host(y), want)

    top = make.empty(y.shape, "float32", layout)
    backend.max_pool_indices(mask, top, **c.options, width=c.size[1])
    for n, ch, i, j in np.ndindex(winner.shape):
        places = {number: h * c.size[1] + w for number, h, w in window(c, i, j)}
        assert make.host(top)[n, ch, i, j] == places.get(winner[n, ch, i, j], -1)

    dy, dx = make(rng.standard_normal(y.shape), dtype, layout), make.empty(x.shape, dtype, layout)
    backend.max_pool_backward(dy, mask, dx, **c.options)
    assert_close(make.host(dx), max_backward(c, make.host(dy), winner), dtype)
    through = make.empty(x.shape, dtype, layout)
    backend.max_pool_backward(dy, mask, through, y, **c.options)
    np.testing.assert_array_equal(make.host(through), rectified(make.host(dx), make.host(x)))  # x: a winner's value is its window's y


@pytest.mark.parametrize("dtype", DTYPES)
def test_max_of_infinities_and_nan(backend, make, dtype: str) -> None:
    c = Case((2, 6), (2, 2), (2, 2), (0, 0))
    nan, low, high = np.nan, -np.inf, np.inf
    x = make(np.array([[[[nan, 1, low, low, high, nan], [2, nan, low, low, nan, high]]]]), dtype)
    y, mask = make.empty((1, 1, 1, 3), dtype), make.empty((1, 1, 1, 3), "uint8")
    backend.max_pool_forward(x, y, mask, **c.options)
    assert make.host(y).ravel().tolist() == [2.0, LOWEST[dtype], np.inf]
    assert make.host(mask).ravel().tolist() == [2, 255, 0]
    dx = make.empty(x.shape, dtype)
    backend.max_pool_backward(make(np.ones((1, 1, 1, 3)), dtype), mask, dx, **c.options)
    assert make.host(dx).ravel().tolist() == [0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_infinite_gradient_goes_to_the_winner_alone(backend, make, dtype: str) -> None:
    dx = make.empty((1, 1, 2, 2), dtype)
    mask = make(np.array([[[[1]]]]), "uint8")
    backend.max_pool_backward(make(np.array([[[[np.inf]]]]), dtype), mask, dx, kernel=(2, 2), stride=(1, 1), pad=(0, 0))
    assert make.host(dx).ravel().tolist() == [0, np.inf, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_that_is_not_finite_meets_a_relu_as_in_relu_backward(backend, make, dtype: str) -> None:
    dy, y, mask = np.array([[[[np.inf, np.nan, 3.0, -np.inf]]]]), np.array([[[[0.0, 0.0, 0.0, 2.0]]]]), np.array([[[[0, 0, 0, 0]]]])
    dx, want = make.empty((1, 1, 1, 4), dtype), make.empty((1, 1, 1, 4), dtype)
    backend.max_pool_backward(make(dy, dtype), make(mask, "uint8"), dx, make(y, dtype), kernel=(1, 1), stride=(1, 1), pad=(0, 0))
    backend.relu_backward(make(y, dtype), make(dy, dtype), want, slope=0.0)
    np.testing.assert_array_equal(make.host(dx), make.host(want))
    assert make.host(dx).ravel()[2:].tolist() == [0.0, -np.inf]


@pytest.mark.parametrize("layout", ["contract", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [5, 16])
@pytest.mark.parametrize("name", CASES)
def test_average(backend, make, rng, name: str, channels: int, dtype: str, layout: str) -> None:
    c = CASES[name]
    x, y = make(rng.standard_normal((2, channels, *c.size)), dtype, layout), make.empty((2, channels, *c.out), dtype, layout)
    backend.ave_pool_forward(x, y, **c.options)
    values, want = make.host(x), np.zeros(y.shape)
    dy, dx = make(rng.standard_normal(y.shape), dtype, layout), make.empty(x.shape, dtype, layout)
    backend.ave_pool_backward(dy, dx, **c.options)
    gradient, want_dx = make.host(dy), np.zeros(x.shape)
    for i, j in np.ndindex(c.out):
        cells = window(c, i, j)
        if not cells:
            want[:, :, i, j] = np.nan
        for _, h, w in cells:
            want[:, :, i, j] += values[:, :, h, w] / area(c, i, j)
            want_dx[:, :, h, w] += gradient[:, :, i, j] / area(c, i, j)
    assert_close(make.host(y), want, dtype)
    assert_close(make.host(dx), want_dx, dtype)
    through = make.empty(x.shape, dtype, layout)
    backend.ave_pool_backward(dy, through, x, **c.options)
    np.testing.assert_array_equal(make.host(through), rectified(make.host(dx), values))


def test_average_of_twos_as_caffe_gives_it(backend, make) -> None:
    c = Case((4, 4), (3, 3), (2, 2), (1, 1))
    y = make.empty((1, 1, 3, 3))
    backend.ave_pool_forward(make(np.full((1, 1, 4, 4), 2.0)), y, **c.options)
    np.testing.assert_allclose(make.host(y)[0, 0], [[8 / 9, 4 / 3, 2 / 3], [4 / 3, 2, 1], [2 / 3, 1, 0.5]], rtol=1e-6)


@pytest.mark.parametrize("name", ["3x3 stride 2", "padded", "rectangular"])
def test_gradients_agree_with_differences(reference, rng, name: str) -> None:
    c = CASES[name]
    # Distinct values at least 0.01 apart: a step of 1e-3 changes no winner.
    x = last(rng.permutation(2 * c.size[0] * c.size[1]).reshape(1, 2, *c.size) * 0.01)
    dy = last(rng.standard_normal((1, 2, *c.out)))
    mask, dx = last(np.zeros(dy.shape, np.uint8)), np.empty_like(x)

    def run_max(v: np.ndarray) -> np.ndarray:
        y = np.empty_like(dy)
        reference.max_pool_forward(v, y, None, **c.options)
        return y

    def run_average(v: np.ndarray) -> np.ndarray:
        y = np.empty_like(dy)
        reference.ave_pool_forward(v, y, **c.options)
        return y

    reference.max_pool_forward(x, np.empty_like(dy), mask, **c.options)
    reference.max_pool_backward(dy, mask, dx, **c.options)
    np.testing.assert_allclose(dx, numeric_gradient(run_max, x, dy, 1e-3), atol=1e-9)
    reference.ave_pool_backward(dy, dx, **c.options)
    np.testing.assert_allclose(dx, numeric_gradient(run_average, x, dy, 1e-3), atol=1e-9)
