"""Softmax, losses and accuracy, position by position: stem losses."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from arrays import DTYPES, assert_close, last, numeric_gradient

from caffelite.errors import DataError

SHAPES = [((7, 11), 1), ((3, 5, 2, 7), 1), ((2, 3, 5), 2), ((5, 3, 2), 0), ((2, 3, 5, 2), 3)]
LAYOUTS = ["contract", "gaps"]
IGNORE = 2


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    y = np.zeros(x.shape)
    for outer in np.ndindex(tuple(s for i, s in enumerate(x.shape) if i != axis)):
        line = (*outer[:axis], slice(None), *outer[axis:])
        powers = [math.exp(v - max(x[line])) for v in x[line]]
        y[line] = [p / sum(powers) for p in powers]
    return y


def positions(shape: tuple[int, ...], axis: int) -> list[tuple[int, ...]]:
    """Places of the other axes, in the labels' order."""
    return list(np.ndindex(tuple(s for i, s in enumerate(shape) if i != axis)))


def line(place: tuple[int, ...], axis: int, at: object) -> tuple:
    return (*place[:axis], at, *place[axis:])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_softmax(backend, make, rng, shape, axis: int, dtype: str, layout: str) -> None:
    x, dy = make(4 * rng.standard_normal(shape), dtype, layout), make(rng.standard_normal(shape), dtype, layout)
    y, dx = make.empty(shape, dtype, layout), make.empty(shape, dtype, layout)
    backend.softmax_forward(x, y, axis=axis)
    assert_close(make.host(y), softmax(make.host(x), axis), dtype)
    backend.softmax_backward(y, dy, dx, axis=axis)
    p, d = make.host(y), make.host(dy)
    assert_close(make.host(dx), p * (d - (d * p).sum(axis=axis, keepdims=True)), dtype)
    backend.softmax_forward(x, x, axis=axis)
    np.testing.assert_array_equal(make.host(x), make.host(y))
    backend.softmax_backward(y, dy, dy, axis=axis)
    np.testing.assert_array_equal(make.host(dy), make.host(dx))


def test_softmax_of_large_scores(backend, make) -> None:
    y = make.empty((2, 3))
    backend.softmax_forward(make(np.array([[1e4, 1e4, -1e4], [-3e38, 0, 3e38]])), y, axis=1)
    np.testing.assert_allclose(make.host(y), [[0.5, 0.5, 0], [0, 0, 1]])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalization", ["FULL", "VALID", "BATCH_SIZE", "NONE"])
@pytest.mark.parametrize("ignore", [None, IGNORE])
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_softmax_loss(backend, make, rng, shape, axis: int, ignore, normalization: str, dtype: str, layout: str) -> None:
    places = positions(shape, axis)
    numbers = rng.integers(0, shape[axis], len(places))
    numbers[0] = IGNORE % shape[axis]
    x, label = make(2 * rng.standard_normal(shape), dtype, layout), make(numbers + rng.uniform(0, 0.9, len(places)))
    prob, loss, normalizer = make.empty(shape, "float32", layout), make.empty(()), make.empty(())
    options = {"axis": axis, "ignore_label": ignore}
    backend.softmax_loss_forward(x, label, prob, loss, normalizer, **options, normalization=normalization)
    p = softmax(make.host(x), axis)
    counted = [n != ignore for n in numbers]
    outer = math.prod(shape[:axis])
    divisor = max(1, {"FULL": len(places), "VALID": sum(counted), "BATCH_SIZE": outer, "NONE": 1}[normalization])
    want = -sum(math.log(p[line(place, axis, n)]) for place, n, c in zip(places, numbers, counted) if c) / divisor
    assert_close(make.host(prob), p)
    assert_close(make.host(loss), want)
    assert make.host(normalizer) == divisor

    dx = make.empty(shape, dtype, layout)
    backend.softmax_loss_backward(prob, label, make(np.array(0.75)), normalizer, dx, **options)
    want_dx = np.zeros(shape)
    for place, n, c in zip(places, numbers, counted):
        if c:
            want_dx[line(place, axis, slice(None))] = p[line(place, axis, slice(None))] * 0.75 / divisor
            want_dx[line(place, axis, n)] -= 0.75 / divisor
    assert_close(make.host(dx), want_dx, dtype)


def test_softmax_loss_of_a_batch_that_is_ignored_whole(backend, make, rng) -> None:
    x, label = make(rng.standard_normal((3, 5))), make(np.full(3, 255.0))
    prob, loss, normalizer, dx = make.empty((3, 5)), make.empty(()), make.empty(()), make.empty((3, 5))
    backend.softmax_loss_forward(x, label, prob, loss, normalizer, axis=1, ignore_label=255, normalization="VALID")
    assert (make.host(loss), make.host(normalizer)) == (0, 1)
    backend.softmax_loss_backward(prob, label, make(np.array(1.0)), normalizer, dx, axis=1, ignore_label=255)
    assert not make.host(dx).any()


def test_softmax_loss_is_clamped_at_the_smallest_float(backend, make) -> None:
    loss, normalizer = make.empty(()), make.empty(())
    x, label = make(np.array([[0.0, 200.0]])), make(np.zeros(1))
    backend.softmax_loss_forward(x, label, make.empty((1, 2)), loss, normalizer, axis=1, ignore_label=None, normalization="VALID")
    np.testing.assert_allclose(make.host(loss), 126 * math.log(2), rtol=1e-6)  # FLT_MIN is 2^-126


def test_a_nan_score_gives_a_nan_loss(backend, make) -> None:
    loss, normalizer = make.empty(()), make.empty(())
    x = make(np.array([[np.nan, 0.0], [1.0, 2.0]]))
    backend.softmax_loss_forward(x, make(np.zeros(2)), make.empty((2, 2)), loss, normalizer, axis=1, ignore_label=None, normalization="VALID")
    assert np.isnan(make.host(loss))


@pytest.mark.parametrize(("bad", "said"), [(5.0, "5"), (-1.0, "-1"), (math.nan, "nan"), (1e30, "1e+30")])
def test_a_label_out_of_range(backend, make, rng, bad: float, said: str) -> None:
    x, label = make(rng.standard_normal((3, 5))), make(np.array([0.0, bad, 4.0]))
    message = re.escape(f"label {said} at position 1 of the batch is outside 0..4")
    prob, one, other = make.empty((3, 5)), make.empty(()), make.empty(())
    with pytest.raises(DataError, match=message):
        backend.softmax_loss_forward(x, label, prob, one, other, axis=1, ignore_label=None, normalization="VALID")
    with pytest.raises(DataError, match=message):
        backend.accuracy(x, label, one, None, top_k=1, axis=1, ignore_label=3)
    if bad == -1:  # ignoring it makes it legal
        backend.softmax_loss_forward(x, label, prob, one, other, axis=1, ignore_label=-1, normalization="VALID")
        assert make.host(other) == 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_euclidean_loss(backend, make, rng, dtype: str, layout: str) -> None:
    shape = (3, 5, 2, 7)
    a, b = (make(rng.standard_normal(shape), dtype, layout) for _ in range(2))
    loss, dx = make.empty(()), make.empty(shape, dtype, layout)
    backend.euclidean_loss_forward(a, b, loss)
    difference = make.host(a) - make.host(b)
    assert_close(make.host(loss), (difference**2).sum() / 6)
    for sign in (1, -1):
        backend.euclidean_loss_backward(a, b, make(np.array(0.5)), dx, sign=sign)
        assert_close(make.host(dx), sign * 0.5 * difference / 3, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("ignore", [None, IGNORE])
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_accuracy(backend, make, rng, shape, axis: int, ignore, top_k: int, dtype: str) -> None:
    places, classes = positions(shape, axis), shape[axis]
    x = make(rng.integers(-2, 3, shape), dtype)  # few values, so many ties
    numbers = rng.integers(0, classes, len(places))
    accuracy, per_class = make.empty(()), make.empty((classes,))
    backend.accuracy(x, make(numbers), accuracy, per_class, top_k=top_k, axis=axis, ignore_label=ignore)
    right, total = np.zeros(classes), np.zeros(classes)
    for place, n in zip(places, numbers):
        scores = list(make.host(x)[line(place, axis, slice(None))])
        rivals = sum(score >= scores[n] for i, score in enumerate(scores) if i != n)
        if n != ignore:
            total[n] += 1
            right[n] += rivals < top_k
    assert_close(make.host(accuracy), right.sum() / max(1, total.sum()))
    assert_close(make.host(per_class), [r / t if t else 0 for r, t in zip(right, total)])
    alone = make.empty(())
    backend.accuracy(x, make(numbers), alone, None, top_k=top_k, axis=axis, ignore_label=ignore)
    assert make.host(alone) == make.host(accuracy)


def test_accuracy_of_ties_nan_and_nothing(backend, make) -> None:
    accuracy = make.empty(())
    x = make(np.array([[1.0, 1.0, 1.0], [np.nan, 5.0, 6.0], [np.nan, 0.0, 1.0]]))
    for label, want in (([0, 0, 2], 2 / 3), ([1, 1, 0], 1 / 3), ([2, 2, 2], 2 / 3)):
        backend.accuracy(x, make(np.array(label)), accuracy, None, top_k=1, axis=1, ignore_label=None)
        np.testing.assert_allclose(make.host(accuracy), want, rtol=1e-6)
    backend.accuracy(x, make(np.ones(3)), accuracy, None, top_k=1, axis=1, ignore_label=1)
    assert make.host(accuracy) == 0


def test_gradients_agree_with_differences(reference, rng) -> None:
    x, dy, dx = last(rng.standard_normal((2, 5, 2, 3))), last(rng.standard_normal((2, 5, 2, 3))), np.empty((2, 5, 2, 3))
    label, prob, loss, normalizer = rng.integers(0, 5, 12).astype(np.float64), np.empty_like(x), np.empty(()), np.empty(())

    def plain(v: np.ndarray) -> np.ndarray:
        y = np.empty_like(x)
        reference.softmax_forward(v, y, axis=1)
        return y

    def softmax_loss(v: np.ndarray) -> np.ndarray:
        reference.softmax_loss_forward(v, label, prob, loss, normalizer, axis=1, ignore_label=IGNORE, normalization="VALID")
        return loss

    def euclidean(v: np.ndarray) -> np.ndarray:
        reference.euclidean_loss_forward(v, dy, loss)
        return loss

    reference.softmax_backward(plain(x), dy, dx, axis=1)
    np.testing.assert_allclose(dx, numeric_gradient(plain, x, dy), atol=1e-8)
    weight = np.array(0.75)
    want = numeric_gradient(softmax_loss, x, weight)
    softmax_loss(x)
    reference.softmax_loss_backward(prob, label, weight, normalizer, dx, axis=1, ignore_label=IGNORE)
    np.testing.assert_allclose(dx, want, atol=1e-8)
    reference.euclidean_loss_backward(x, dy, weight, dx, sign=1)
    np.testing.assert_allclose(dx, numeric_gradient(euclidean, x, weight), atol=1e-7)
