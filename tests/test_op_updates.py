"""Reductions and update rules, element by element in float64: stem updates."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from arrays import assert_close

from caffelite.backends.contract import JOURNAL_HEAD, Dials, Segment, Update

COUNT = 1009
# Elements 500..520 belong to no segment and must not move; rates and decays differ.
SEGMENTS = [Segment(0, 401, 1.0, 0.05), Segment(401, 500, 2.0, 0.0), Segment(520, COUNT, 0.0, 0.3)]
RATE = 0.1


def cells(backend, *values: float):
    """Values in one float64 array."""
    array = backend.empty((len(values),), "float64")
    backend.assign(array, values)
    return array


def how(backend, segments=SEGMENTS, *, grad_scale: float = 1.0, skip: float = 0.0, l1: bool = False, write_step: bool = False, lowered=None) -> Update:
    dials = Dials(*(cells(backend, value) for value in (RATE, grad_scale, skip)))
    return Update(segments, dials, l1, write_step, lowered)


def sgd(g, rate, h, v, o):
    h = o["momentum"] * h + rate * g
    return h, h, v


def nesterov(g, rate, h, v, o):
    new = o["momentum"] * h + rate * g
    return (1 + o["momentum"]) * new - o["momentum"] * h, new, v


def adagrad(g, rate, h, v, o):
    h = h + g * g
    return rate * g / (math.sqrt(h) + o["delta"]), h, v


def rmsprop(g, rate, h, v, o):
    h = o["rms_decay"] * h + (1 - o["rms_decay"]) * g * g
    return rate * g / (math.sqrt(h) + o["delta"]), h, v


def adadelta(g, rate, h, v, o):
    m, delta = o["momentum"], o["delta"]
    h = m * h + (1 - m) * g * g
    d = g * math.sqrt((v + delta) / (h + delta))
    return rate * d, h, m * v + (1 - m) * d * d


def adam(g, rate, h, v, o):
    a, b = o["momentum"], o["momentum2"]
    h, v = a * h + (1 - a) * g, b * v + (1 - b) * g * g
    return rate * h / (math.sqrt(v) + o["delta"]), h, v


RULES = {
    "sgd": (sgd, 1, {"momentum": 0.9}),
    "nesterov": (nesterov, 1, {"momentum": 0.8}),
    "adagrad": (adagrad, 1, {"delta": 1e-3}),
    "rmsprop": (rmsprop, 1, {"rms_decay": 0.95, "delta": 1e-3}),
    "adadelta": (adadelta, 2, {"momentum": 0.9, "delta": 1e-3}),
    "adam": (adam, 2, {"momentum": 0.9, "momentum2": 0.99, "delta": 1e-3}),
}


def expected(rule, options, w, g, h, v, segments, l1: bool, grad_scale: float):
    w, h, v, step = w.copy(), h.copy(), v.copy(), g.copy()
    for segment in segments:
        for i in range(segment.start, segment.stop):
            decayed = g[i] * grad_scale + segment.decay * (np.sign(w[i]) if l1 else w[i])
            step[i], h[i], v[i] = rule(decayed, RATE * segment.lr_mult, h[i], v[i], options)
            w[i] -= step[i]
    return w, h, v, step


@pytest.mark.parametrize("write_step", [False, True])
@pytest.mark.parametrize(("l1", "grad_scale"), [(False, 1.0), (True, 0.25)])
@pytest.mark.parametrize("name", RULES)
def test_rule(backend, make, rng, name: str, l1: bool, grad_scale: float, write_step: bool) -> None:
    rule, states, options = RULES[name]
    w, g, h, v = rng.standard_normal((4, COUNT))
    w[::7] = 0  # where sign is 0
    h, v = (h if name in ("sgd", "nesterov", "adam") else np.abs(h)), np.abs(v)
    arrays = [make(a) for a in (w, g, h, v)[: 2 + states]]
    given = [make.host(a) for a in arrays] + [make.host(make(v))] * (2 - states)
    getattr(backend, f"{name}_update")(*arrays, how(backend, grad_scale=grad_scale, l1=l1, write_step=write_step), **options)
    want_w, want_h, want_v, step = expected(rule, options, *given, SEGMENTS, l1, grad_scale)
    assert_close(make.host(arrays[0]), want_w)
    assert_close(make.host(arrays[2]), want_h)
    if states == 2:
        assert_close(make.host(arrays[3]), want_v)
    if write_step:
        for segment in SEGMENTS:
            assert_close(make.host(arrays[1])[segment.start : segment.stop], step[segment.start : segment.stop])
    for got, before in zip(arrays, given):
        np.testing.assert_array_equal(make.host(got)[500:520], before[500:520])


@pytest.mark.parametrize("name", RULES)
def test_a_long_array_is_updated_as_short_ones_are(backend, make, rng, name: str) -> None:
    """Several pieces and threads: the bits of every element are those of the same update on a few elements."""
    _, states, options = RULES[name]
    count = (1 << 20) + 137
    values = [np.resize(np.abs(rng.standard_normal(8191)), count) for _ in range(2 + states)]
    whole = [make(a) for a in values]
    getattr(backend, f"{name}_update")(*whole, how(backend, [Segment(0, count, 1.0, 0.01)], grad_scale=0.5, write_step=True), **options)
    part = [make(a[:8191]) for a in values]
    getattr(backend, f"{name}_update")(*part, how(backend, [Segment(0, 8191, 1.0, 0.01)], grad_scale=0.5, write_step=True), **options)
    for got, want in zip(whole, part):
        np.testing.assert_allclose(make.host(got), np.resize(make.host(want), count), rtol=1e-6)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("start", [0, 1], ids=["whole vectors", "off a vector's boundary"])
def test_the_copy_in_bfloat16_follows(backend, make, rng, name: str, start: int) -> None:
    """Where segments are, it holds the new weights, rounded to nearest even; elsewhere nobody asks."""
    _, states, options = RULES[name]
    values = [np.abs(rng.standard_normal(COUNT + start)) for _ in range(2 + states)]
    arrays, lowered = [make(a)[start:] for a in values], make(np.full(COUNT + start, 7.0), "bfloat16")[start:]
    getattr(backend, f"{name}_update")(*arrays, how(backend, lowered=lowered), **options)
    got, want = make.host(lowered), make.host(arrays[0]).astype(ml_dtypes.bfloat16).astype(np.float64)
    for segment in SEGMENTS:
        np.testing.assert_array_equal(got[segment.start : segment.stop], want[segment.start : segment.stop])


@pytest.mark.parametrize("name", RULES)
def test_a_skipped_update_changes_nothing(backend, make, rng, name: str) -> None:
    _, states, options = RULES[name]
    values = [np.abs(rng.standard_normal(COUNT)) for _ in range(2 + states)]
    arrays = [make(a) for a in values]
    before = [make.host(a) for a in arrays]
    getattr(backend, f"{name}_update")(*arrays, how(backend, skip=1, write_step=True), **options)
    for got, want in zip(arrays, before):
        np.testing.assert_array_equal(make.host(got), want)


def test_clip_gradients(backend, make) -> None:
    """3, 4 and zeros have the norm 5."""
    g, norm, scale = make(np.array([3.0, *[0.0] * 1000, 4.0])), cells(backend, -1), cells(backend, -1)
    for limit, want in ((10, 0.5), (5, 0.5), (2, 0.2)):
        backend.clip_gradients(g, norm, scale, limit=limit, divisor=2)
        assert (backend.to_host(norm)[0], backend.to_host(scale)[0]) == (5, want)


def test_a_norm_that_is_not_finite(backend, make) -> None:
    norm, scale = cells(backend, 0), cells(backend, 0)
    backend.clip_gradients(make(np.array([np.inf, 1.0])), norm, scale, limit=1, divisor=1)
    assert (backend.to_host(norm)[0], backend.to_host(scale)[0]) == (np.inf, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_add_sum(backend, make, dtype: str) -> None:
    """Whole numbers, which both types hold."""
    total = cells(backend, 1000)
    backend.add_sum(make(np.arange(11.0), dtype), total, factor=0.5, accumulate=True)
    assert backend.to_host(total)[0] == 1027.5
    backend.add_sum(make(np.full((2, 3, 5, 7), 3.0), dtype), total, factor=-1, accumulate=False)
    assert backend.to_host(total)[0] == -630


def test_a_journal(backend) -> None:
    journal, value = cells(backend, *[0.0] * (JOURNAL_HEAD + 3)), cells(backend, 0)
    for entry in (3.0, -8.0):
        backend.assign(value, [entry])
        backend.append(journal, value, divisor=2)
    assert backend.to_host(journal).tolist() == [2, 0, 1.5, -4, 0]
    for entry in (np.nan, 2.0, np.inf, 5.0):
        backend.assign(value, [entry])
        backend.append(journal, value, divisor=2)
    count, flag, *values = backend.to_host(journal).tolist()
    assert (count, flag, values[:2]) == (3, 1, [1.5, -4])
    assert math.isnan(values[2])
    backend.assign(journal, [0, 0])
    backend.append(journal, value, divisor=1)
    assert backend.to_host(journal).tolist()[:3] == [1, 0, 5]


@pytest.mark.parametrize("layout", ["contract", "gaps"])
def test_sums(backend, make, rng, layout: str) -> None:
    x = make(rng.standard_normal((3, 5, 7, 11)), "float32", layout)
    np.testing.assert_allclose(backend.sum_squares(x), (make.host(x) ** 2).sum(), rtol=1e-12)
    np.testing.assert_allclose(backend.sum_absolute(x), np.abs(make.host(x)).sum(), rtol=1e-12)
    assert isinstance(backend.sum_squares(x), float)


def test_sums_are_taken_in_float64(backend, make) -> None:
    """In float32 2^24 + 1 is 2^24, so that small terms after a large one would be lost."""
    x = make(np.array([4096.0, *[1.0] * 100]))
    assert backend.sum_squares(x) == 2**24 + 100
    x = make(np.concatenate([[2.0**24], np.ones(2_000_003)]))
    assert backend.sum_absolute(x) == 2**24 + 2_000_003


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_all_finite(backend, make, bad: float, dtype: str) -> None:
    for count in (13, 2_000_003):
        x = make(np.ones(count), dtype)
        assert backend.all_finite(x) is True
        for place in (0, count // 2, count - 1):
            backend.fill(x[place : place + 1], bad)
            assert backend.all_finite(x) is False
            backend.fill(x[place : place + 1], -3e38)
        assert backend.all_finite(x) is True, "large values are finite, also where their sum is not"


@pytest.mark.parametrize("layout", ["contract", "gaps"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scale_in_place(backend, make, rng, dtype: str, layout: str) -> None:
    x = make(rng.standard_normal((2, 5, 3, 7)), dtype, layout)
    want = make.host(x) * 0.3
    backend.scale_in_place(x, 0.3)
    assert_close(make.host(x), want, dtype)
