"""Batch normalisation channel by channel: stem batch_norm."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import DTYPES, assert_close, last, numeric_gradient, rectified

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
        for cell in (make(np.ones(1), "float64"), make(np.full(1, np.nan), "float64")):
            backend.batch_norm_accumulate(make(spread), make(centre), *sums, cell, fraction=0.5, correction=2.0)  # does nothing
    backend.batch_norm_accumulate(make(centre), make(spread), *sums, make(np.zeros(1), "float64"), fraction=1.0, correction=0.0)
    want = [old + new for old, new in zip(want, (centre, 0, 1))]
    for got, expected in zip(sums, want):
        assert_close(make.host(got), expected)
    backend.batch_norm_global_statistics(*sums, mean, variance)
    assert_close(make.host(mean), want[0] / 3.71)
    assert_close(make.host(variance), want[1] / 3.71)


def test_variance_of_values_far_from_zero(backend, make, rng) -> None:
    """The mean is subtracted before squaring; E[x^2]-E[x]^2 in float32 would be off by several units here."""
    values = (1000 + rng.standard_normal((8, 3, 5, 5))).astype(np.float32)
    mean, variance = make.empty((3,)), make.empty((3,))
    backend.batch_norm_statistics(make(values), mean, variance)
    np.testing.assert_allclose(make.host(variance), values.astype(np.float64).var(axis=(0, 2, 3)), rtol=1e-4)


@pytest.mark.parametrize("shape", [(7, 24, 31, 37), (3, 5, 1009)], ids=str)
def test_statistics_put_together_from_many_parts(backend, make, rng, shape) -> None:
    """Each channel drifts from its first value to its last, so that the parts' means differ by many of their deviations."""
    drift = np.linspace(-20, 20, shape[0] * shape[-1]).reshape(shape[0], 1, *(1,) * (len(shape) - 3), shape[-1])
    values = (50 + drift + rng.standard_normal(shape)).astype(np.float32)
    mean, variance = make.empty((shape[1],)), make.empty((shape[1],))
    backend.batch_norm_statistics(make(values), mean, variance)
    axes = (0, *range(2, len(shape)))
    assert_close(make.host(mean), values.astype(np.float64).mean(axis=axes))
    assert_close(make.host(variance), values.astype(np.float64).var(axis=axes))


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


# --- with a scale ------------------------------------------------------------------------------------------------------------

SCALED = [(3, 5, 7, 2), (11, 3), (2, 16, 5, 3), (2, 24, 3, 5), (1, 40, 17, 13), (2, 520, 3, 1)]


def column(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    return values.reshape(1, -1, *(1,) * (x.ndim - 2))


@pytest.mark.parametrize("layout", ["contract", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", SCALED, ids=str)
def test_with_a_scale(backend, make, rng, shape, relu: bool, dtype: str, layout: str) -> None:
    x, dy = make(3 + 2 * rng.standard_normal(shape), dtype, layout), make(0.25 + rng.standard_normal(shape), dtype, layout)
    s, b = make(rng.standard_normal(shape[1])), make(rng.standard_normal(shape[1]))
    axes = tuple(axis for axis in range(len(shape)) if axis != 1)
    values = make.host(x)
    mean, variance = make(values.mean(axis=axes)), make(values.var(axis=axes))
    y = make.empty(shape, dtype, layout)
    backend.batch_norm_scale_forward(x, mean, variance, s, b, y, eps=EPS, relu=relu)
    inverse = 1 / np.sqrt(column(make.host(variance), values) + EPS)
    h = (values - column(make.host(mean), values)) * inverse
    out = h * column(make.host(s), values) + column(make.host(b), values)
    assert_close(make.host(y), np.maximum(out, 0) if relu else out, dtype, slack=3)

    g = rectified(make.host(dy), make.host(y)) if relu else make.host(dy)
    sums = [(g * h).sum(axis=axes), g.sum(axis=axes)]
    centred = g - g.mean(axis=axes, keepdims=True) - h * (g * h).mean(axis=axes, keepdims=True)
    for fixed, more_s, more_b in ((False, False, True), (True, True, False)):
        ds, db = (make(np.full(shape[1], 2.0)) for _ in range(2))
        options = {"eps": EPS, "relu": relu, "fixed": fixed, "accumulate_s": more_s, "accumulate_b": more_b}
        dx = make.empty(shape, dtype, layout)
        backend.batch_norm_scale_backward(x, y, mean, variance, s, b, dy, dx, ds, db, **options)
        assert_close(make.host(ds), sums[0] + 2 * more_s, slack=3)
        assert_close(make.host(db), sums[1] + 2 * more_b, slack=3)
        assert_close(make.host(dx), (g if fixed else centred) * inverse * column(make.host(s), values), dtype, slack=3)
        alone = make.empty(shape, dtype, layout)
        backend.batch_norm_scale_backward(x, y, mean, variance, s, b, dy, alone, None, None, **options)
        np.testing.assert_array_equal(make.host(alone), make.host(dx))
        again = make(make.host(dy), dtype, layout)
        backend.batch_norm_scale_backward(x, y, mean, variance, s, b, again, again, ds, None, **options)
        np.testing.assert_array_equal(make.host(again), make.host(dx))
    backend.batch_norm_scale_forward(x, mean, variance, s, b, x, eps=EPS, relu=relu)
    np.testing.assert_array_equal(make.host(x), make.host(y))


@pytest.mark.parametrize("channels", [3, 16])
def test_nan_passes_a_scale_and_its_relu(backend, make, channels: int) -> None:
    """A ReLU that made it 0 would hide a net that has diverged."""
    values = np.ones((2, channels, 2, 4))
    values[0, 1, 0, 2] = np.nan
    x, y = make(values), make.empty(values.shape)
    zero, one = make(np.zeros(channels)), make(np.ones(channels))
    backend.batch_norm_scale_forward(x, zero, one, one, zero, y, eps=0.0, relu=True)
    np.testing.assert_array_equal(np.isnan(make.host(y)), np.isnan(values))


def test_long_sums_of_gradients(backend, make, rng) -> None:
    """As many terms as fill every slab of a kernel with a mean that float32 sums one after another would lose."""
    x, dy = make(rng.standard_normal((4, 16, 64, 96))), make(1 + 0.01 * rng.standard_normal((4, 16, 64, 96)))
    zero, one, ds, db = make(np.zeros(16)), make(np.ones(16)), make.empty((16,)), make.empty((16,))
    options = {"eps": 0.0, "relu": False, "fixed": False, "accumulate_s": False, "accumulate_b": False}
    backend.batch_norm_scale_backward(x, x, zero, one, one, zero, dy, make.empty(x.shape), ds, db, **options)
    assert_close(make.host(db), make.host(dy).sum(axis=(0, 2, 3)))
    # These terms have both signs: what counts is the sum of their sizes.
    terms = make.host(dy) * make.host(x)
    np.testing.assert_allclose(make.host(ds), terms.sum(axis=(0, 2, 3)), rtol=0, atol=1e-6 * np.abs(terms).sum(axis=(0, 2, 3)).max())


@pytest.mark.parametrize("relu", [False, True])
def test_gradients_with_a_scale_agree_with_differences(reference, rng, relu: bool) -> None:
    x, dy = (last(rng.standard_normal((3, 2, 2, 5))) for _ in range(2))
    s, b, mean, variance = rng.standard_normal(2), rng.standard_normal(2), np.empty(2), np.empty(2)

    def run(v: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
        y = np.empty_like(x)
        reference.batch_norm_statistics(v, mean, variance)
        reference.batch_norm_scale_forward(v, mean, variance, scale, shift, y, eps=EPS, relu=relu)
        return y

    want = [numeric_gradient(f, at, dy) for f, at in ((lambda v: run(v, s, b), x), (lambda v: run(x, v, b), s), (lambda v: run(x, s, v), b))]
    y, dx, ds, db = run(x, s, b), np.empty_like(x), np.empty(2), np.empty(2)
    options = {"eps": EPS, "relu": relu, "fixed": False, "accumulate_s": False, "accumulate_b": False}
    reference.batch_norm_scale_backward(x, y, mean, variance, s, b, dy, dx, ds, db, **options)
    for got, expected in zip((dx, ds, db), want):
        np.testing.assert_allclose(got, expected, atol=1e-7)
