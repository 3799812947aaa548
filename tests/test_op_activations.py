"""ReLU, ELU, Sigmoid, TanH, Power and PReLU against their formulas with Python's math: stem activations."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from arrays import DTYPES, assert_close, last, numeric_gradient

SHAPES = [(2, 5, 3, 7), (3, 11), (2, 3, 5), (13,)]
LAYOUTS = ["contract", "gaps"]


def each(function: Callable[..., float], *arrays: np.ndarray) -> np.ndarray:
    return np.vectorize(function, otypes=[float])(*arrays)


# name: options, y(x), dx(y, dy) as the contract writes them
UNARY = {
    "relu": [
        ({"slope": 0.0}, lambda x: max(x, 0.0), lambda y, dy: dy if y > 0 else 0.0),
        ({"slope": 0.25}, lambda x: x if x > 0 else 0.25 * x, lambda y, dy: dy if y > 0 else 0.25 * dy),
    ],
    "elu": [
        ({"alpha": 1.0}, lambda x: x if x > 0 else math.exp(x) - 1, lambda y, dy: dy if y > 0 else dy * (1 + y)),
        ({"alpha": 0.5}, lambda x: x if x > 0 else 0.5 * (math.exp(x) - 1), lambda y, dy: dy if y > 0 else dy * (0.5 + y)),
    ],
    "sigmoid": [({}, lambda x: 1 / (1 + math.exp(-x)), lambda y, dy: dy * y * (1 - y))],
    "tanh": [({}, math.tanh, lambda y, dy: dy * (1 - y * y))],
}
CASES = [pytest.param(name, *case, id=f"{name}{''.join(map(str, case[0].values()))}") for name, cases in UNARY.items() for case in cases]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "options", "f", "g"), CASES)
def test_unary(backend, make, rng, name: str, options: dict, f, g, shape, dtype: str, layout: str) -> None:
    values = 3 * rng.standard_normal(shape)
    values.flat[:2] = 0.0, -0.0
    x, dy = make(values, dtype, layout), make(rng.standard_normal(shape), dtype, layout)
    run, back = getattr(backend, f"{name}_forward"), getattr(backend, f"{name}_backward")
    y, dx = make.empty(shape, dtype, layout), make.empty(shape, dtype, layout)
    run(x, y, **options)
    assert_close(make.host(y), each(f, make.host(x)), dtype)
    back(y, dy, dx, **options)
    assert_close(make.host(dx), each(g, make.host(y), make.host(dy)), dtype)

    # In place: the same bits.
    run(x, x, **options)
    np.testing.assert_array_equal(make.host(x), make.host(y))
    back(x, dy, dy, **options)
    np.testing.assert_array_equal(make.host(dy), make.host(dx))


def test_relu_keeps_nan(backend, make) -> None:
    for slope in (0.0, 0.5):
        y = make.empty((3,))
        backend.relu_forward(make(np.array([np.nan, -2.0, np.inf])), y, slope=slope)
        np.testing.assert_array_equal(make.host(y), [np.nan, -2.0 * slope, np.inf])


@pytest.mark.parametrize("name", ["elu", "sigmoid", "tanh"])
def test_far_values_saturate(backend, make, name: str) -> None:
    x = make(np.array([-200.0, 200.0, -1e30, 1e30]))
    getattr(backend, f"{name}_forward")(x, x, **({"alpha": 2.0} if name == "elu" else {}))
    want = {"elu": [-2, 200, -2, 1e30], "sigmoid": [0, 1, 0, 1], "tanh": [-1, 1, -1, 1]}[name]
    np.testing.assert_allclose(make.host(x), want, rtol=1e-6)


@pytest.mark.parametrize(("name", "options"), [(n, o) for n, cases in UNARY.items() for o, _, _ in cases])
def test_unary_gradients_agree_with_differences(reference, rng, name: str, options: dict) -> None:
    x = last(rng.standard_normal((2, 3, 3, 5)))
    x[np.abs(x) < 1e-3] = 0.5  # away from the kink at 0
    dy, dx = last(rng.standard_normal(x.shape)), np.empty_like(x)

    def run(v: np.ndarray) -> np.ndarray:
        y = np.empty_like(x)
        getattr(reference, f"{name}_forward")(v, y, **options)
        return y

    getattr(reference, f"{name}_backward")(run(x), dy, dx, **options)
    np.testing.assert_allclose(dx, numeric_gradient(run, x, dy), atol=1e-8)


POWERS = [(1.0, 1.0, 0.0), (1.0, -2.0, 0.5), (2.0, 0.5, 1.0), (2.0, 3.0, 0.0), (3.0, 1.5, 0.0), (0.5, 1.0, 4.0), (-1.0, 0.5, 3.0)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("power", "scale", "shift"), POWERS)
def test_power(backend, make, rng, power: float, scale: float, shift: float, dtype: str, layout: str) -> None:
    x, dy = make(rng.uniform(0.5, 2.0, (2, 5, 3, 7)), dtype, layout), make(rng.standard_normal((2, 5, 3, 7)), dtype, layout)
    y, dx = make.empty(x.shape, dtype, layout), make.empty(x.shape, dtype, layout)
    backend.power_forward(x, y, power=power, scale=scale, shift=shift)
    assert_close(make.host(y), each(lambda v: math.pow(shift + scale * v, power), make.host(x)), dtype)
    backend.power_backward(x, y, dy, dx, power=power, scale=scale, shift=shift)
    slope = each(lambda v: power * scale * math.pow(shift + scale * v, power - 1), make.host(x))
    # Backward reads y as it was rounded to bfloat16: one more last place.
    assert_close(make.host(dx), make.host(dy) * slope, dtype, slack=1 if dtype == "float32" else 2)


@pytest.mark.parametrize(("power", "scale", "shift", "want"), [(0, 2, 3, 1), (0, 0, 0, 1), (2, 0, 3, 9), (-1, 0, 0, math.inf), (0.5, 0, -1, math.nan)])
def test_a_power_that_does_not_depend_on_x(backend, make, power: float, scale: float, shift: float, want: float) -> None:
    x = make(np.array([1.0, -1.0, np.nan]))
    y, dx = make.empty((3,)), make.empty((3,))
    backend.power_forward(x, y, power=float(power), scale=float(scale), shift=float(shift))
    np.testing.assert_array_equal(make.host(y), [want] * 3)
    backend.power_backward(x, y, make(np.ones(3)), dx, power=float(power), scale=float(scale), shift=float(shift))
    assert make.host(dx).tolist() == [0, 0, 0]


def test_the_gradient_of_a_power_at_a_zero_base_is_nan_as_in_caffe(backend, make) -> None:
    for scale, shift, at in ((2.0, 0.0, 0.0), (2.0, -3.0, 1.5)):
        x, y, dx = make(np.array([at])), make.empty((1,)), make.empty((1,))
        backend.power_forward(x, y, power=3.0, scale=scale, shift=shift)
        backend.power_backward(x, y, make(np.ones(1)), dx, power=3.0, scale=scale, shift=shift)
        assert make.host(y).tolist() == [0.0]
        assert np.isnan(make.host(dx)).all()
    backend.power_backward(make(np.zeros(1)), y, make(np.ones(1)), dx, power=2.0, scale=2.0, shift=0.0)
    assert make.host(dx).tolist() == [0.0], "a square's gradient is written without a division"


@pytest.mark.parametrize(("power", "scale", "shift"), POWERS)
def test_power_gradient_agrees_with_differences(reference, rng, power: float, scale: float, shift: float) -> None:
    x, dy = rng.uniform(0.5, 2.0, (3, 7)), rng.standard_normal((3, 7))

    def run(v: np.ndarray) -> np.ndarray:
        y = np.empty_like(x)
        reference.power_forward(v, y, power=power, scale=scale, shift=shift)
        return y

    dx = np.empty_like(x)
    reference.power_backward(x, run(x), dy, dx, power=power, scale=scale, shift=shift)
    np.testing.assert_allclose(dx, numeric_gradient(run, x, dy), atol=1e-7)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 3, 7), (3, 11), (2, 3, 5)], ids=str)
def test_prelu(backend, make, rng, shape, shared: bool, dtype: str, layout: str) -> None:
    x, dy = (make(rng.standard_normal(shape), dtype, layout) for _ in range(2))
    slopes = rng.uniform(-0.5, 1.5, () if shared else shape[1])
    a = make(slopes, dtype)
    y, dx = make.empty(shape, dtype, layout), make.empty(shape, dtype, layout)
    at = [np.broadcast_to(make.host(a), shape[1:2])[i[1]] for i in np.ndindex(shape)]
    spread = np.reshape(at, shape)
    backend.prelu_forward(x, a, y)
    assert_close(make.host(y), each(lambda v, s: v if v > 0 else s * v, make.host(x), spread), dtype)
    backend.prelu_backward_data(x, a, dy, dx)
    assert_close(make.host(dx), each(lambda v, s, d: d if v > 0 else s * d, make.host(x), spread, make.host(dy)), dtype)
    terms = each(lambda v, d: v * d if v <= 0 else 0.0, make.host(x), make.host(dy))
    want = terms.sum() if shared else np.array([terms[:, c].sum() for c in range(shape[1])])
    for more in (False, True):
        da = make(np.full(slopes.shape, 2.0))
        backend.prelu_backward_slope(x, dy, da, accumulate=more)
        assert_close(make.host(da), want + 2 * more)
    backend.prelu_backward_data(x, a, dy, dy)
    np.testing.assert_array_equal(make.host(dy), make.host(dx))
    backend.prelu_forward(x, a, x)
    np.testing.assert_array_equal(make.host(x), make.host(y))


def test_prelu_gradients_agree_with_differences(reference, rng) -> None:
    x, a = last(rng.standard_normal((2, 3, 3, 5))), rng.uniform(0.1, 0.9, 3)
    x[np.abs(x) < 1e-3] = 0.5
    dy, dx, da = last(rng.standard_normal(x.shape)), np.empty_like(x), np.empty_like(a)

    def run(v: np.ndarray, s: np.ndarray) -> np.ndarray:
        y = np.empty_like(x)
        reference.prelu_forward(v, s, y)
        return y

    reference.prelu_backward_data(x, a, dy, dx)
    reference.prelu_backward_slope(x, dy, da, accumulate=False)
    np.testing.assert_allclose(dx, numeric_gradient(lambda v: run(v, a), x, dy), atol=1e-8)
    np.testing.assert_allclose(da, numeric_gradient(lambda s: run(x, s), a, dy), atol=1e-8)
