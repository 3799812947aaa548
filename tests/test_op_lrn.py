"""Local response normalisation against its definition, window by window: stem lrn."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import DTYPES, assert_close, last, numeric_gradient, rectified

SHAPES = [(2, 11, 5, 7), (2, 32, 3, 5)]  # fast paths want multiples of 16 channels
ACROSS = [
    {"size": 5, "alpha": 1e-4, "beta": 0.75, "k": 1.0},  # AlexNet's
    {"size": 3, "alpha": 2.0, "beta": 0.5, "k": 2.0},
    {"size": 1, "alpha": 1.0, "beta": 1.0, "k": 0.5},
    {"size": 7, "alpha": 1.0, "beta": 0.75, "k": 1.0},
    {"size": 25, "alpha": 0.5, "beta": 0.75, "k": 1.0},  # wider than the channels
]
WITHIN = [{"size": 3, "alpha": 5e-5, "beta": 0.75}, {"size": 5, "alpha": 2.0, "beta": 0.5}, {"size": 1, "alpha": 1.0, "beta": 1.0}]


def across_sum(v: np.ndarray, size: int) -> np.ndarray:
    half = (size - 1) // 2
    return np.stack([v[:, max(0, c - half) : c + half + 1].sum(axis=1) for c in range(v.shape[1])], axis=1)


def within_sum(v: np.ndarray, size: int) -> np.ndarray:
    half, total = (size - 1) // 2, np.zeros(v.shape)
    for h, w in np.ndindex(v.shape[2:]):
        total[:, :, h, w] = v[:, :, max(0, h - half) : h + half + 1, max(0, w - half) : w + half + 1].sum(axis=(2, 3))
    return total


def forward(x: np.ndarray, neighbours, factor: float, k: float, size: int, beta: float) -> tuple[np.ndarray, np.ndarray]:
    scale = k + factor * neighbours(x**2, size)
    return x / scale**beta, scale


def backward(x: np.ndarray, y: np.ndarray, dy: np.ndarray, scale: np.ndarray, neighbours, factor: float, size: int, beta: float) -> np.ndarray:
    return dy / scale**beta - 2 * factor * beta * x * neighbours(dy * y / scale, size)


@pytest.mark.parametrize("layout", ["contract", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("o", ACROSS, ids=lambda o: f"size{o['size']}")
def test_across_channels(backend, make, rng, o: dict, shape, dtype: str, layout: str) -> None:
    x, dy = (make(rng.standard_normal(shape), dtype, layout) for _ in range(2))
    y, dx = make.empty(shape, dtype, layout), make.empty(shape, dtype, layout)
    work = make.empty((backend.lrn_workspace(shape, dtype, **o),), "uint8")
    backend.lrn_forward(x, y, work, **o)
    factor = o["alpha"] / o["size"]
    want, scale = forward(make.host(x), across_sum, factor, o["k"], o["size"], o["beta"])
    assert_close(make.host(y), want, dtype)
    backend.lrn_backward(x, y, dy, dx, work, **o)
    # Backward reads y as it was rounded; with bfloat16 the window's terms may differ by their own last place each.
    want_dx = backward(make.host(x), make.host(y), make.host(dy), scale, across_sum, factor, o["size"], o["beta"])
    assert_close(make.host(dx), want_dx, dtype, slack=1 if dtype == "float32" else 3)
    through = make.empty(shape, dtype, layout)
    backend.lrn_backward(x, y, dy, through, work, **o, relu=True)
    np.testing.assert_array_equal(make.host(through), rectified(make.host(dx), make.host(x)))
    alone = make.empty(shape, dtype, layout)
    backend.lrn_forward(x, alone, None, **o)
    np.testing.assert_array_equal(make.host(alone), make.host(y))


@pytest.mark.parametrize("layout", ["contract", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("o", WITHIN, ids=lambda o: f"size{o['size']}")
def test_within_a_channel(backend, make, rng, o: dict, shape, dtype: str, layout: str) -> None:
    x, dy = (make(rng.standard_normal(shape), dtype, layout) for _ in range(2))
    y, dx = make.empty(shape, dtype, layout), make.empty(shape, dtype, layout)
    work = make.empty((backend.lrn_within_workspace(shape, dtype, **o),), "uint8")
    backend.lrn_within_forward(x, y, work, **o)
    factor = o["alpha"] / o["size"] ** 2
    want, scale = forward(make.host(x), within_sum, factor, 1.0, o["size"], o["beta"])
    assert_close(make.host(y), want, dtype)
    backend.lrn_within_backward(x, y, dy, dx, work, **o)
    want_dx = backward(make.host(x), make.host(y), make.host(dy), scale, within_sum, factor, o["size"], o["beta"])
    assert_close(make.host(dx), want_dx, dtype, slack=1 if dtype == "float32" else 3)
    through = make.empty(shape, dtype, layout)
    backend.lrn_within_backward(x, y, dy, through, work, **o, relu=True)
    np.testing.assert_array_equal(make.host(through), rectified(make.host(dx), make.host(x)))
    alone = make.empty(shape, dtype, layout)
    backend.lrn_within_forward(x, alone, None, **o)
    np.testing.assert_array_equal(make.host(alone), make.host(y))


@pytest.mark.parametrize("kind", ["lrn", "lrn_within"])
def test_gradients_agree_with_differences(reference, rng, kind: str) -> None:
    options = {"size": 3, "alpha": 2.0, "beta": 0.75} | ({"k": 1.5} if kind == "lrn" else {})
    x, dy = (last(rng.standard_normal((1, 5, 3, 4))) for _ in range(2))
    work = np.zeros(getattr(reference, f"{kind}_workspace")(x.shape, "float64", **options), np.uint8)

    def run(v: np.ndarray) -> np.ndarray:
        y = np.empty_like(x)
        getattr(reference, f"{kind}_forward")(v, y, work, **options)
        return y

    y, dx = run(x), np.empty_like(x)
    getattr(reference, f"{kind}_backward")(x, y, dy, dx, work, **options)
    # Differences with step 1e-6 lose about 1e-16/1e-6 to cancellation and 1e-12 to curvature.
    np.testing.assert_allclose(dx, numeric_gradient(run, x, dy), atol=1e-8)
