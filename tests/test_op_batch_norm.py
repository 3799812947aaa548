"""Batch normalisation channel by channel: stem batch_norm."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import DTYPES, assert_close, last, numeric_gradient

SHAPES = [(3, 5, 7, 2), (11, 3), (2, 3, 5), (2, 3, 2, 3, 5)]
EPS = 1e-3


def split(x: np.ndarray) -> list[np.ndarray]:
    return [x[:, c] for c in range(x.shape[1])]


def join(channels: list[np.ndarray]) -> np.ndarray:
    return np.stack(channels, axis=1)


@pytest.mark.parametrize("layout", ["contract", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all(backend, make, rng, shape, dtype: str, layout: str) -> None:
    x, dy = make(3 + 2 * rng.standard_normal(shape), dtype, layout), make(rng.standard_normal(shape), dtype, layout)
    mean, variance = make.empty(shape[1:2]), make.empty(shape[1:2])
    y, dx = make.empty(shape, dtype, layout), make.empty(shape, dtype, layout)
    backend.batch_norm_statistics(x, mean, variance)
    means = [c.mean() for c in split(make.host(x))]
    variances = [((c - c.mean()) ** 2).mean() for c in split(make.host(x))]
    assert_close(make.host(mean), means)
    assert_close(make.host(variance), variances)

    backend.batch_norm_forward(x, mean, variance, y, eps=EPS)
    roots = [np.sqrt(v + EPS) for v in variances]
    # x - mean loses the digits that x and the mean share, a factor of 3 here.
    assert_close(make.host(y), join([(c - m) / r for c, m, r in zip(split(make.host(x)), means, roots)]), dtype, slack=3)

    backend.batch_norm_backward(y, variance, dy, dx, eps=EPS)
    pairs = zip(split(make.host(y)), split(make.host(dy)), roots)
    assert_close(make.host(dx), join([(d - d.mean() - c * (c * d).mean()) / r for c, d, r in pairs]), dtype, slack=3)
    trained = make.host(dx)
    backend.batch_norm_backward_global(variance, dy, dx, eps=EPS)
    assert_close(make.host(dx), join([d / r for d, r in zip(split(make.host(dy)), roots)]), dtype)

    stored = make.host(dx)
    again = make(make.host(dy), dtype, layout)
    backend.batch_norm_backward_global(variance, again, again, eps=EPS)
    np.testing.assert_array_equal(make.host(again), stored)
    backend.batch_norm_backward(y, variance, dy, dy, eps=EPS)
    np.testing.assert_array_equal(make.host(dy), trained)
    backend.batch_norm_forward(x, mean, variance, x, eps=EPS)
    np.testing.assert_array_equal(make.host(x), make.host(y))


def test_moving_sums_and_what_they_say(backend, make, rng) -> None:
    batches = [(rng.standard_normal(5), rng.random(5)) for _ in range(3)]
    sums = [make(np.zeros(5)), make(np.zeros(5)), make(np.zeros(1))]
    mean, variance = make.empty((5,)), make.empty((5,))
    backend.batch_norm_global_statistics(*sums, mean, variance)
    assert not make.host(mean).any()
    assert not make.host(variance).any()
    want = [np.zeros(5), np.zeros(5), np.zeros(1)]
    for centre, spread in batches:
        backend.batch_norm_accumulate(make(centre), make(spread), *sums, fraction=0.9, correction=7 / 6)
        want = [0.9 * old + new for old, new in zip(want, (centre, spread * 7 / 6, np.ones(1)))]
    for got, expected in zip(sums, want):
        assert_close(make.host(got), expected)
    backend.batch_norm_global_statistics(*sums, mean, variance)
    assert_close(make.host(mean), want[0] / 2.71)
    assert_close(make.host(variance), want[1] / 2.71)


def test_variance_of_values_far_from_zero(backend, make, rng) -> None:
    """The mean is subtracted before squaring; E[x^2]-E[x]^2 in float32 would be off by several units here."""
    values = (1000 + rng.standard_normal((8, 3, 5, 5))).astype(np.float32)
    mean, variance = make.empty((3,)), make.empty((3,))
    backend.batch_norm_statistics(make(values), mean, variance)
    np.testing.assert_allclose(make.host(variance), values.astype(np.float64).var(axis=(0, 2, 3)), rtol=1e-4)


def test_gradient_agrees_with_differences(reference, rng) -> None:
    x, dy = (last(rng.standard_normal((3, 2, 2, 5))) for _ in range(2))
    mean, variance = np.empty(2), np.empty(2)

    def run(v: np.ndarray) -> np.ndarray:
        y = np.empty_like(x)
        reference.batch_norm_statistics(v, mean, variance)
        reference.batch_norm_forward(v, mean, variance, y, eps=EPS)
        return y

    want, dx = numeric_gradient(run, x, dy), np.empty_like(x)
    reference.batch_norm_backward(run(x), variance, dy, dx, eps=EPS)
    np.testing.assert_allclose(dx, want, atol=1e-8)
