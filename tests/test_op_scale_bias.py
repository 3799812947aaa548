"""Scale and Bias with operands that broadcast: stem scale_bias."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import DTYPES, assert_close, last, numeric_gradient

SHAPES = [  # x, operand
    ((2, 5, 3, 7), (1, 5, 1, 1)),
    ((2, 5, 3, 7), (1, 5, 3, 1)),
    ((2, 5, 3, 7), (2, 5, 3, 7)),
    ((2, 5, 3, 7), (1, 1, 1, 1)),
    ((2, 5, 3, 7), (2, 1, 1, 1)),
    ((3, 11), (1, 11)),
    ((2, 3, 5), (1, 3, 5)),
    ((13,), (13,)),
]


def folded(terms: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sums each term into the cell of `shape` that it belongs to."""
    total = np.zeros(shape)
    for index in np.ndindex(terms.shape):
        total[tuple(i if size > 1 else 0 for i, size in zip(index, shape))] += terms[index]
    return total


@pytest.mark.parametrize("layout", ["contract", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "small"), SHAPES, ids=str)
def test_all(backend, make, rng, shape, small, dtype: str, layout: str) -> None:
    x, dy = (make(rng.standard_normal(shape), dtype, layout) for _ in range(2))
    s, b = (make(rng.standard_normal(small), dtype) for _ in range(2))
    y, dx = make.empty(shape, dtype, layout), make.empty(shape, dtype, layout)
    backend.scale_forward(x, s, None, y)
    assert_close(make.host(y), make.host(x) * make.host(s), dtype)
    backend.scale_forward(x, s, b, y)
    assert_close(make.host(y), make.host(x) * make.host(s) + make.host(b), dtype)
    backend.scale_backward_data(dy, s, dx)
    assert_close(make.host(dx), make.host(dy) * make.host(s), dtype)
    for more in (False, True):
        ds, db = make(np.full(small, 2.0)), make(np.full(small, 2.0))
        backend.scale_backward_factor(x, dy, ds, accumulate=more)
        assert_close(make.host(ds), folded(make.host(x) * make.host(dy), small) + 2 * more)
        backend.bias_backward(dy, db, accumulate=more)
        assert_close(make.host(db), folded(make.host(dy), small) + 2 * more)
    scaled = make.host(y)
    backend.bias_forward(x, b, y)
    assert_close(make.host(y), make.host(x) + make.host(b), dtype)

    summed, again = make.host(y), make(make.host(x), dtype, layout)
    backend.bias_forward(again, b, again)
    np.testing.assert_array_equal(make.host(again), summed)
    backend.scale_forward(x, s, b, x)
    np.testing.assert_array_equal(make.host(x), scaled)
    backend.scale_backward_data(dy, s, dy)
    np.testing.assert_array_equal(make.host(dy), make.host(dx))


def test_gradients_agree_with_differences(reference, rng) -> None:
    x, s, b, dy = last(rng.standard_normal((2, 3, 2, 5))), *rng.standard_normal((2, 1, 3, 1, 1)), last(rng.standard_normal((2, 3, 2, 5)))

    def run(x, s, b) -> np.ndarray:
        y = np.empty_like(dy)
        reference.scale_forward(x, s, b, y)
        return y

    dx, ds, db = np.empty_like(x), np.empty_like(s), np.empty_like(b)
    reference.scale_backward_data(dy, s, dx)
    reference.scale_backward_factor(x, dy, ds, accumulate=False)
    reference.bias_backward(dy, db, accumulate=False)
    np.testing.assert_allclose(dx, numeric_gradient(lambda v: run(v, s, b), x, dy, 1e-3), atol=1e-9)
    np.testing.assert_allclose(ds, numeric_gradient(lambda v: run(x, v, b), s, dy, 1e-3), atol=1e-9)
    np.testing.assert_allclose(db, numeric_gradient(lambda v: run(x, s, v), b, dy, 1e-3), atol=1e-9)
