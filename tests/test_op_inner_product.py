"""InnerProduct against sums written out, and against differences: stem inner_product."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import DTYPES, assert_close, drawn_mask, dropout_key, numeric_gradient, rectified, same_bits

from caffelite.backends.contract import Drop

M, K, N = 5, 23, 11


def product(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """y[m,n] = sum_k x[m,k] w[n,k]."""
    return np.array([[sum(a * b for a, b in zip(row, other)) for other in w] for row in x])


def setup(make, rng, transpose: bool, dtype: str, layout: str = "contract"):
    x = make(rng.standard_normal((M, K)), dtype, layout)
    w = make(rng.standard_normal((K, N) if transpose else (N, K)), dtype, layout)
    return x, w, make(rng.standard_normal(N), dtype), make(rng.standard_normal((M, N)), dtype, layout)


@pytest.mark.parametrize("layout", ["contract", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transpose", [False, True])
def test_forward(backend, make, rng, transpose: bool, dtype: str, layout: str) -> None:
    x, w, b, _ = setup(make, rng, transpose, dtype, layout)
    want = product(make.host(x), make.host(w).T if transpose else make.host(w))
    for bias in (None, b):
        for relu in (False, True):
            y = make.empty((M, N), dtype, layout)
            backend.inner_product_forward(x, w, bias, y, transpose=transpose, relu=relu)
            full = want if bias is None else want + make.host(b)
            assert_close(make.host(y), np.maximum(full, 0) if relu else full, dtype)


@pytest.mark.parametrize("layout", ["contract", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transpose", [False, True])
def test_backward(backend, make, rng, transpose: bool, dtype: str, layout: str) -> None:
    x, w, _, dy = setup(make, rng, transpose, dtype, layout)
    dx = make.empty((M, K), dtype, layout)
    backend.inner_product_backward_data(dy, w, dx, transpose=transpose)
    assert_close(make.host(dx), product(make.host(dy), make.host(w) if transpose else make.host(w).T), dtype)
    through = make.empty((M, K), dtype, layout)
    backend.inner_product_backward_data(dy, w, through, x, transpose=transpose)
    np.testing.assert_array_equal(make.host(through), rectified(make.host(dx), make.host(x)))
    want_w = product(make.host(x).T, make.host(dy).T) if transpose else product(make.host(dy).T, make.host(x).T)
    for more_w, more_b in ((False, True), (True, False)):
        dw, db = make(np.full(w.shape, 3.0), "float32", layout), make(np.full(N, 3.0))
        backend.inner_product_backward_weights(x, dy, dw, db, transpose=transpose, accumulate_w=more_w, accumulate_b=more_b)
        assert_close(make.host(dw), want_w + 3 * more_w)
        assert_close(make.host(db), make.host(dy).sum(axis=0) + 3 * more_b)


@pytest.mark.parametrize("layout", ["contract", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transpose", [False, True])
def test_dropout_on_the_way(backend, make, rng, transpose: bool, dtype: str, layout: str) -> None:
    """As the ops do it one after the other."""
    x, w, b, dy = setup(make, rng, transpose, dtype, layout)
    key = (2**63 + 5, 7, 2**40)
    drop, mask = Drop(0.3, dropout_key(backend, *key)), make.empty((M, N), "uint8", layout)
    for bias in (None, b):
        for relu in (False, True):
            y, want = (make.empty((M, N), dtype, layout) for _ in range(2))
            backend.inner_product_forward(x, w, bias, y, transpose=transpose, relu=relu, drop=drop)
            backend.inner_product_forward(x, w, bias, want, transpose=transpose, relu=relu)
            backend.dropout_forward(want, want, mask, ratio=0.3, key=drop.key)
            same_bits(make.host(y), make.host(want))
            assert not make.host(y)[~drawn_mask((M, N), 0.3, key)].any()
    above, mask = make.empty((M, K), dtype, layout), make.empty((M, K), "uint8", layout)
    backend.relu_forward(x, above, slope=0.0)
    backend.dropout_forward(above, above, mask, ratio=0.3, key=drop.key)
    dx, want = (make.empty((M, K), dtype, layout) for _ in range(2))
    backend.inner_product_backward_data(dy, w, dx, above, transpose=transpose, ratio=0.3)
    backend.inner_product_backward_data(dy, w, want, transpose=transpose)
    backend.dropout_backward(want, mask, want, above, ratio=0.3)
    same_bits(make.host(dx), make.host(want))
    assert 0.15 < (make.host(dx) != 0).mean() < 0.55


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_on_the_way_of_what_is_not_finite(backend, make, dtype: str) -> None:
    """Of the largest numbers, too, which the factor takes beyond; and the smallest."""
    values = [np.inf, -np.inf, np.nan, 3.3e38, -3.3e38, 1e-38, 1e-40, -1.0, 0.0, 2.0]
    rows, columns, half = len(values), 64, 0.5
    drop, mask = Drop(half, dropout_key(backend, 1, 2, 3)), make.empty((rows, columns), "uint8")
    one, of_all = make(np.array(values)[:, None], dtype), make(np.ones((columns, 1)), dtype)
    for relu in (False, True):
        y, want = (make.empty((rows, columns), dtype) for _ in range(2))
        backend.inner_product_forward(one, of_all, None, y, transpose=False, relu=relu, drop=drop)
        backend.inner_product_forward(one, of_all, None, want, transpose=False, relu=relu)
        backend.dropout_forward(want, want, mask, ratio=half, key=drop.key)
        same_bits(make.host(y), make.host(want))
    wild = [2.0, 1e38, 3.0] if backend.name == "onednn" else [np.inf, np.nan, 3e38]  # oneDNN takes NaN for positive
    ways = np.tile([*wild, 1e-38, 1.0, 0.0, 0.0, -0.0], 8)  # what comes out of a ReLU
    above, want = make(np.tile(ways, (rows, 1)), dtype), make.empty((rows, columns), dtype)
    backend.dropout_forward(above, above, mask, ratio=half, key=drop.key)
    backend.inner_product_backward_data(one, make(np.ones((1, columns)), dtype), y, above, transpose=False, ratio=half)
    backend.inner_product_backward_data(one, make(np.ones((1, columns)), dtype), want, transpose=False)
    backend.dropout_backward(want, mask, want, above, ratio=half)
    same_bits(make.host(y), make.host(want))


@pytest.mark.parametrize("transpose", [False, True])
def test_tf32_rounds_operands_alone_or_nothing(backend, make, rng, transpose: bool) -> None:
    """Whole numbers of few bits survive it: every result is exact on every backend."""
    x, w, b, dy = (make(rng.integers(-4, 5, make.host(array).shape)) for array in setup(make, rng, transpose, "float32"))
    y, dx, dw = make.empty((M, N)), make.empty((M, K)), make.empty(w.shape)
    matrix = make.host(w).T if transpose else make.host(w)
    backend.inner_product_forward(x, w, b, y, transpose=transpose, tf32=True)
    backend.inner_product_backward_data(dy, w, dx, transpose=transpose, tf32=True)
    backend.inner_product_backward_weights(x, dy, dw, None, transpose=transpose, accumulate_w=False, accumulate_b=False, tf32=True)
    np.testing.assert_array_equal(make.host(y), product(make.host(x), matrix) + make.host(b))
    np.testing.assert_array_equal(make.host(dx), product(make.host(dy), matrix.T))
    gradient = product(make.host(dy).T, make.host(x).T)
    np.testing.assert_array_equal(make.host(dw), gradient.T if transpose else gradient)


def test_each_gradient_can_be_left_out(backend, make, rng) -> None:
    x, w, _, dy = setup(make, rng, False, "float32")
    dw, db = make.empty(w.shape), make.empty((N,))
    backend.inner_product_backward_weights(x, dy, dw, None, transpose=False, accumulate_w=False, accumulate_b=False)
    backend.inner_product_backward_weights(x, dy, None, db, transpose=False, accumulate_w=False, accumulate_b=False)
    assert_close(make.host(dw), make.host(dy).T @ make.host(x))
    assert_close(make.host(db), make.host(dy).sum(axis=0))


@pytest.mark.parametrize("transpose", [False, True])
def test_gradients_agree_with_differences(reference, rng, transpose: bool) -> None:
    x, w, b = rng.standard_normal((M, K)), rng.standard_normal((K, N) if transpose else (N, K)), rng.standard_normal(N)
    dy = rng.standard_normal((M, N))

    def run(x, w, b) -> np.ndarray:
        y = np.empty((M, N))
        reference.inner_product_forward(x, w, b, y, transpose=transpose)
        return y

    dx, dw, db = np.empty_like(x), np.empty_like(w), np.empty_like(b)
    reference.inner_product_backward_data(dy, w, dx, transpose=transpose)
    reference.inner_product_backward_weights(x, dy, dw, db, transpose=transpose, accumulate_w=False, accumulate_b=False)
    np.testing.assert_allclose(dx, numeric_gradient(lambda v: run(v, w, b), x, dy, 1e-3), atol=1e-9)
    np.testing.assert_allclose(dw, numeric_gradient(lambda v: run(x, v, b), w, dy, 1e-3), atol=1e-9)
    np.testing.assert_allclose(db, numeric_gradient(lambda v: run(x, w, v), b, dy, 1e-3), atol=1e-9)
