"""Convolution against nested loops in float64, and against differences: stem convolution."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
from arrays import DTYPES, assert_close, drawn_mask, dropout_key, last, numeric_gradient, rectified, same_bits

from caffelite.backends.contract import Drop


class Case(NamedTuple):
    batch: int
    channels: int
    filters: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    pad: tuple[int, ...]
    dilation: tuple[int, ...]
    group: int

    @property
    def out(self) -> tuple[int, ...]:
        spans = zip(self.size, self.pad, self.dilation, self.kernel, self.stride)
        return tuple((s + 2 * p - (d * (k - 1) + 1)) // step + 1 for s, p, d, k, step in spans)

    @property
    def options(self) -> dict[str, object]:
        return {"stride": self.stride, "pad": self.pad, "dilation": self.dilation, "group": self.group}


CASES = {
    "1x1": Case(3, 7, 5, (5, 7), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1 stride 2 pad 1": Case(2, 3, 5, (5, 7), (1, 1), (2, 2), (1, 1), (1, 1), 1),
    "3x3 pad": Case(2, 5, 7, (7, 5), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "16 channels": Case(2, 16, 32, (7, 5), (3, 3), (1, 1), (1, 1), (1, 1), 1),  # fast paths want multiples of 16
    "1x1 of 16 channels": Case(2, 32, 16, (5, 7), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "16 channels in groups": Case(2, 32, 32, (5, 7), (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "5x5 stride leaves a rest": Case(2, 3, 11, (11, 13), (5, 5), (3, 4), (0, 1), (1, 1), 1),
    "rectangular": Case(2, 3, 5, (7, 11), (2, 5), (3, 1), (1, 0), (1, 1), 1),
    "dilated": Case(2, 3, 5, (11, 7), (3, 2), (1, 2), (2, 1), (2, 3), 1),
    "groups": Case(2, 6, 9, (5, 5), (3, 3), (1, 1), (1, 1), (1, 1), 3),
    "a filter for each channel": Case(2, 5, 5, (5, 7), (3, 3), (2, 2), (1, 1), (1, 1), 5),
    "whole image": Case(3, 2, 3, (5, 3), (5, 3), (1, 1), (0, 0), (1, 1), 1),
    "8 channels, stride 2": Case(2, 8, 16, (7, 6), (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "stride and dilation share a factor": Case(2, 8, 8, (9, 21), (3, 4), (2, 4), (1, 2), (2, 6), 1),
    "stride beyond the kernel": Case(2, 8, 16, (11, 8), (2, 1), (5, 3), (1, 0), (3, 1), 2),
    "image of 4 channels": Case(2, 4, 16, (9, 7), (5, 3), (2, 1), (2, 1), (1, 1), 1),
    "1 axis": Case(2, 3, 5, (13,), (3,), (2,), (1,), (2,), 1),
    "1 axis in groups": Case(2, 16, 32, (9,), (3,), (1,), (1,), (1,), 2),
    "3 axes": Case(2, 2, 4, (3, 5, 4), (2, 3, 1), (1, 2, 1), (1, 0, 0), (1, 1, 1), 2),
}
SMALL = ["rectangular", "dilated", "groups", "1 axis", "3 axes", "1x1 stride 2 pad 1"]


def pairs(c: Case):
    """Every (output place, kernel place, input place) whose input place lies in the image."""
    for p in product(*map(range, c.out)):
        for k in product(*map(range, c.kernel)):
            i = tuple(a * s + b * d - e for a, s, b, d, e in zip(p, c.stride, k, c.dilation, c.pad))
            if all(0 <= a < size for a, size in zip(i, c.size)):
                yield p, k, i


def blocks(c: Case):
    """The channels and filters of each group."""
    for g in range(c.group):
        yield slice(g * c.channels // c.group, (g + 1) * c.channels // c.group), slice(g * c.filters // c.group, (g + 1) * c.filters // c.group)


def forward(c: Case, x: np.ndarray, w: np.ndarray, b: np.ndarray | None) -> np.ndarray:
    y = np.zeros((c.batch, c.filters, *c.out))
    for part, filters in blocks(c):
        for p, k, i in pairs(c):
            y[(slice(None), filters, *p)] += np.einsum("nc,oc->no", x[(slice(None), part, *i)], w[(filters, slice(None), *k)])
    return y if b is None else y + b.reshape(-1, *(1,) * len(c.out))


def backward_data(c: Case, dy: np.ndarray, w: np.ndarray) -> np.ndarray:
    dx = np.zeros((c.batch, c.channels, *c.size))
    for part, filters in blocks(c):
        for p, k, i in pairs(c):
            dx[(slice(None), part, *i)] += np.einsum("no,oc->nc", dy[(slice(None), filters, *p)], w[(filters, slice(None), *k)])
    return dx


def backward_weights(c: Case, x: np.ndarray, dy: np.ndarray) -> np.ndarray:
    dw = np.zeros((c.filters, c.channels // c.group, *c.kernel))
    for part, filters in blocks(c):
        for p, k, i in pairs(c):
            dw[(filters, slice(None), *k)] += np.einsum("no,nc->oc", dy[(slice(None), filters, *p)], x[(slice(None), part, *i)])
    return dw


def arrays(make, rng, c: Case, dtype: str, layout: str = "contract"):
    x = make(rng.standard_normal((c.batch, c.channels, *c.size)), dtype, layout)
    w = make(rng.standard_normal((c.filters, c.channels // c.group, *c.kernel)), dtype, layout)
    b = make(rng.standard_normal(c.filters), dtype)
    dy = make(rng.standard_normal((c.batch, c.filters, *c.out)), dtype, layout)
    return x, w, b, dy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_forward(backend, make, rng, name: str, dtype: str) -> None:
    c = CASES[name]
    x, w, b, _ = arrays(make, rng, c, dtype)
    for bias in (None, b):
        for relu in (False, True):
            y = make.empty((c.batch, c.filters, *c.out), dtype)
            backend.convolution_forward(x, w, bias, y, **c.options, relu=relu)
            want = forward(c, make.host(x), make.host(w), None if bias is None else make.host(bias))
            assert_close(make.host(y), np.maximum(want, 0) if relu else want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_backward_data(backend, make, rng, name: str, dtype: str) -> None:
    c = CASES[name]
    x, w, _, dy = arrays(make, rng, c, dtype)
    dx, through = make.empty(x.shape, dtype), make.empty(x.shape, dtype)
    backend.convolution_backward_data(dy, w, dx, **c.options)
    assert_close(make.host(dx), backward_data(c, make.host(dy), make.host(w)), dtype)
    backend.convolution_backward_data(dy, w, through, x, **c.options)
    np.testing.assert_array_equal(make.host(through), rectified(make.host(dx), make.host(x)))


@pytest.mark.parametrize("layout", ["contract", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_dropout_on_the_way(backend, make, rng, name: str, dtype: str, layout: str) -> None:
    """As the ops do it one after the other."""
    c, key = CASES[name], (2**63 + 5, 7, 2**40)
    x, w, b, dy = arrays(make, rng, c, dtype, layout)
    drop, mask = Drop(0.3, dropout_key(backend, *key)), make.empty(dy.shape, "uint8", layout)
    for bias, relu in ((None, True), (b, True), (b, False)):
        y, want = (make.empty(dy.shape, dtype, layout) for _ in range(2))
        backend.convolution_forward(x, w, bias, y, **c.options, relu=relu, drop=drop)
        backend.convolution_forward(x, w, bias, want, **c.options, relu=relu)
        backend.dropout_forward(want, want, mask, ratio=0.3, key=drop.key)
        same_bits(make.host(y), make.host(want))
        assert not make.host(y)[~drawn_mask(dy.shape, 0.3, key)].any()
    above, mask = make.empty(x.shape, dtype, layout), make.empty(x.shape, "uint8", layout)
    backend.relu_forward(x, above, slope=0.0)
    backend.dropout_forward(above, above, mask, ratio=0.3, key=drop.key)
    dx, want = (make.empty(x.shape, dtype, layout) for _ in range(2))
    backend.convolution_backward_data(dy, w, dx, above, **c.options, ratio=0.3)
    backend.convolution_backward_data(dy, w, want, **c.options)
    backend.dropout_backward(want, mask, want, above, ratio=0.3)
    same_bits(make.host(dx), make.host(want))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_backward_weights(backend, make, rng, name: str, dtype: str) -> None:
    c = CASES[name]
    x, w, _, dy = arrays(make, rng, c, dtype)
    want_w = backward_weights(c, make.host(x), make.host(dy))
    want_b = make.host(dy).sum(axis=(0, *range(2, dy.ndim)))
    for more_w, more_b in ((False, True), (True, False)):
        dw, db = (make(np.full(s, 2.0)) if more else make.empty(s) for s, more in ((w.shape, more_w), ((c.filters,), more_b)))
        backend.convolution_backward_weights(x, dy, dw, db, **c.options, accumulate_w=more_w, accumulate_b=more_b)
        assert_close(make.host(dw), want_w + 2 * more_w)  # float32 sums of products that are exact in float32
        assert_close(make.host(db), want_b + 2 * more_b)
    alone = make.empty((c.filters,))
    backend.convolution_backward_weights(x, dy, None, alone, **c.options, accumulate_w=False, accumulate_b=False)
    assert_close(make.host(alone), want_b)
    alone = make.empty(w.shape)
    backend.convolution_backward_weights(x, dy, alone, None, **c.options, accumulate_w=False, accumulate_b=False)
    assert_close(make.host(alone), want_w)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["plain", "gaps"])
@pytest.mark.parametrize("name", ["1x1", "3x3 pad", "groups"])
def test_any_strides(backend, make, rng, name: str, layout: str, dtype: str) -> None:
    c = CASES[name]
    x, w, b, dy = arrays(make, rng, c, dtype, layout)
    y, dx, dw = make.empty(dy.shape, dtype, layout), make.empty(x.shape, dtype, layout), make.empty(w.shape, "float32", layout)
    backend.convolution_forward(x, w, b, y, **c.options)
    assert_close(make.host(y), forward(c, make.host(x), make.host(w), make.host(b)), dtype)
    backend.convolution_backward_data(dy, w, dx, **c.options)
    assert_close(make.host(dx), backward_data(c, make.host(dy), make.host(w)), dtype)
    through = make.empty(x.shape, dtype, layout)
    backend.convolution_backward_data(dy, w, through, positive=x, **c.options)
    np.testing.assert_array_equal(make.host(through), rectified(make.host(dx), make.host(x)))
    backend.convolution_backward_weights(x, dy, dw, None, **c.options, accumulate_w=False, accumulate_b=False)
    assert_close(make.host(dw), backward_weights(c, make.host(x), make.host(dy)))


def test_float32_parameters_with_bfloat16_activations(backend, make, rng) -> None:
    c = CASES["3x3 pad"]
    x, _, _, _ = arrays(make, rng, c, "bfloat16")
    _, w, b, _ = arrays(make, rng, c, "bfloat16")
    master_w, master_b = make(make.host(w)), make(make.host(b))
    y = make.empty((c.batch, c.filters, *c.out), "bfloat16")
    backend.convolution_forward(x, master_w, master_b, y, **c.options)
    assert_close(make.host(y), forward(c, make.host(x), make.host(w), make.host(b)), "bfloat16")


@pytest.mark.parametrize("name", ["3x3 pad", "dilated", "16 channels in groups", "1 axis", "3 axes"])
def test_tf32_rounds_operands_alone_or_nothing(backend, make, rng, name: str) -> None:
    """Whole numbers of few bits survive it: every result is exact on every backend."""
    c = CASES[name]
    x, w, b, dy = (make(rng.integers(-4, 5, make.host(array).shape)) for array in arrays(make, rng, c, "float32"))
    y, dx, dw = make.empty(dy.shape), make.empty(x.shape), make.empty(w.shape)
    backend.convolution_forward(x, w, b, y, **c.options, tf32=True)
    backend.convolution_backward_data(dy, w, dx, **c.options, tf32=True)
    backend.convolution_backward_weights(x, dy, dw, None, **c.options, accumulate_w=False, accumulate_b=False, tf32=True)
    np.testing.assert_array_equal(make.host(y), forward(c, make.host(x), make.host(w), make.host(b)))
    np.testing.assert_array_equal(make.host(dx), backward_data(c, make.host(dy), make.host(w)))
    np.testing.assert_array_equal(make.host(dw), backward_weights(c, make.host(x), make.host(dy)))


def test_images_are_taken_in_several_parts(reference, rng, monkeypatch) -> None:
    c = CASES["3x3 pad"]._replace(batch=5)
    x, w = last(rng.standard_normal((5, 5, 7, 5))), last(rng.standard_normal((7, 5, 3, 3)))
    dy = last(rng.standard_normal((5, 7, 7, 5)))
    monkeypatch.setattr("caffelite.backends.numpy.convolution.COLUMN_BYTES", 2 * 35 * 45 * 4)
    y, dx, dw = np.empty_like(dy), np.empty_like(x), np.empty_like(w)
    reference.convolution_forward(x, w, None, y, **c.options)
    reference.convolution_backward_data(dy, w, dx, **c.options)
    reference.convolution_backward_weights(x, dy, dw, None, **c.options, accumulate_w=False, accumulate_b=False)
    np.testing.assert_allclose(y, forward(c, x, w, None), atol=1e-12)
    np.testing.assert_allclose(dx, backward_data(c, dy, w), atol=1e-12)
    np.testing.assert_allclose(dw, backward_weights(c, x, dy), atol=1e-12)


@pytest.mark.parametrize("name", SMALL)
def test_gradients_agree_with_differences(reference, rng, name: str) -> None:
    c = CASES[name]._replace(batch=1)
    x = last(rng.standard_normal((1, c.channels, *c.size)))
    w, b = last(rng.standard_normal((c.filters, c.channels // c.group, *c.kernel))), rng.standard_normal(c.filters)
    dy = last(rng.standard_normal((1, c.filters, *c.out)))

    def run(x, w, b) -> np.ndarray:
        y = np.empty_like(dy)
        reference.convolution_forward(x, w, b, y, **c.options)
        return y

    dx, dw, db = np.empty_like(x), np.zeros_like(w), np.zeros_like(b)
    reference.convolution_backward_data(dy, w, dx, **c.options)
    reference.convolution_backward_weights(x, dy, dw, db, **c.options, accumulate_w=False, accumulate_b=False)
    # The op is linear in each argument, so differences are exact up to cancellation, about 1e-16/1e-3.
    np.testing.assert_allclose(dx, numeric_gradient(lambda v: run(v, w, b), x, dy, 1e-3), atol=1e-9)
    np.testing.assert_allclose(dw, numeric_gradient(lambda v: run(x, v, b), w, dy, 1e-3), atol=1e-9)
    np.testing.assert_allclose(db, numeric_gradient(lambda v: run(x, w, v), b, dy, 1e-3), atol=1e-9)
