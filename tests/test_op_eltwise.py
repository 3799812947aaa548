"""Sums, products and maxima of several arrays: stem eltwise."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import DTYPES, assert_close, last, numeric_gradient, rectified

SHAPES = [(2, 5, 3, 7), (3, 11)]


@pytest.mark.parametrize("layout", ["contract", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("coeffs", [(1.0,), (0.5,), (1.0, 1.0), (1.0, 1.0, 1.0), (0.5, -2.0, 1.0)], ids=str)
def test_sum(backend, make, rng, coeffs, shape, dtype: str, layout: str) -> None:
    xs, y = [make(rng.standard_normal(shape), dtype, layout) for _ in coeffs], make.empty(shape, dtype, layout)
    backend.eltwise_sum(xs, y, coeffs)
    assert_close(make.host(y), sum(c * make.host(x) for c, x in zip(coeffs, xs)), dtype)
    other, positive = make.empty(shape, dtype, layout), make(rng.standard_normal(shape), dtype, layout)
    backend.eltwise_sum(xs, other, coeffs, relu=True)
    np.testing.assert_array_equal(make.host(other), np.maximum(make.host(y), 0))
    backend.eltwise_sum(xs, other, coeffs, positive)
    np.testing.assert_array_equal(make.host(other), rectified(make.host(y), make.host(positive)))
    backend.eltwise_sum(xs, xs[0], coeffs)
    np.testing.assert_array_equal(make.host(xs[0]), make.host(y))


@pytest.mark.parametrize("count", [2, 7])  # 7: more than a kernel takes at once
def test_nan_passes_a_sum_and_its_relu(backend, make, count: int) -> None:
    xs, y = [make(np.array([-1.0, np.nan, 1.0])) for _ in range(count)], make.empty((3,))
    backend.eltwise_sum(xs, y, [1.0] * count, relu=True)
    np.testing.assert_array_equal(make.host(y), [0, np.nan, count])
    backend.eltwise_sum(xs, y, [1.0] * count, make(np.array([1.0, 1.0, 0.0])))
    np.testing.assert_array_equal(make.host(y), [-count, np.nan, 0])


@pytest.mark.parametrize("layout", ["contract", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(backend, make, rng, shape, count: int, dtype: str, layout: str) -> None:
    xs = [make(rng.uniform(0.5, 2, shape) * rng.choice([-1, 1], shape), dtype, layout) for _ in range(count)]
    y, dy, dx = make.empty(shape, dtype, layout), make(rng.standard_normal(shape), dtype, layout), make.empty(shape, dtype, layout)
    backend.eltwise_product_forward(xs, y)
    assert_close(make.host(y), np.prod([make.host(x) for x in xs], axis=0), dtype)
    for index in range(count):
        others = np.prod([make.host(x) for i, x in enumerate(xs) if i != index], axis=0)
        for stable in (True, False):
            backend.eltwise_product_backward(xs, y, dy, dx, index=index, stable=stable)
            # The unstable form divides a rounded y: one more last place.
            assert_close(make.host(dx), others * make.host(dy), dtype, slack=2)


def test_a_zero_factor(backend, make) -> None:
    xs, y, dx = [make(np.array([0.0])), make(np.array([3.0]))], make(np.array([0.0])), make.empty((1,))
    backend.eltwise_product_backward(xs, y, make(np.array([2.0])), dx, index=0, stable=True)
    assert make.host(dx).tolist() == [6.0]
    backend.eltwise_product_backward(xs, y, make(np.array([2.0])), dx, index=0, stable=False)
    assert np.isnan(make.host(dx)).all()


@pytest.mark.parametrize("layout", ["contract", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_max(backend, make, rng, count: int, dtype: str, layout: str) -> None:
    shape = (2, 5, 3, 7)
    xs = [make(rng.integers(-2, 3, shape), dtype, layout) for _ in range(count)]  # few values, so many ties
    y, winner, dx = make.empty(shape, dtype, layout), make.empty(shape, "uint8", layout), make.empty(shape, dtype, layout)
    dy = make(rng.standard_normal(shape), dtype, layout)
    backend.eltwise_max_forward(xs, y, winner)
    values = np.stack([make.host(x) for x in xs])
    want = np.where(values[0] > values[1], 0, 1)
    for i in range(2, count):
        want = np.where(values[i] > np.max(values[:i], axis=0), i, want)
    np.testing.assert_array_equal(make.host(y), values.max(axis=0))
    np.testing.assert_array_equal(make.host(winner), want)
    for index in range(count):
        backend.eltwise_max_backward(winner, dy, dx, index=index)
        np.testing.assert_array_equal(make.host(dx), np.where(want == index, make.host(dy), 0))


def test_gradients_agree_with_differences(reference, rng) -> None:
    xs = [last(rng.standard_normal((2, 3, 2, 5))) for _ in range(3)]
    dy, dx, winner = last(rng.standard_normal((2, 3, 2, 5))), np.empty_like(xs[0]), last(np.zeros((2, 3, 2, 5), np.uint8))
    for index in range(3):

        def product(v: np.ndarray, index: int = index) -> np.ndarray:
            y = np.empty_like(dy)
            reference.eltwise_product_forward([v if i == index else x for i, x in enumerate(xs)], y)
            return y

        def maximum(v: np.ndarray, index: int = index) -> np.ndarray:
            y = np.empty_like(dy)
            reference.eltwise_max_forward([v if i == index else x for i, x in enumerate(xs)], y, winner)
            return y

        for stable in (True, False):
            reference.eltwise_product_backward(xs, product(xs[index]), dy, dx, index=index, stable=stable)
            np.testing.assert_allclose(dx, numeric_gradient(product, xs[index], dy), atol=1e-8)
        want = numeric_gradient(maximum, xs[index], dy)
        maximum(xs[index])
        reference.eltwise_max_backward(winner, dy, dx, index=index)
        np.testing.assert_allclose(dx, want, atol=1e-8)
