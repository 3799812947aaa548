"""Arrays for op tests: laid out as the contract says or otherwise, between guard zones; comparison; numeric gradients."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, prod
from typing import Any

import numpy as np

from caffelite.backends.contract import DropoutKey

Array = Any
Shape = tuple[int, ...]
DTYPES = ("float32", "bfloat16")
BYTES = {"float32": 4, "bfloat16": 2, "float64": 8, "uint8": 1, "int32": 4}
GUARD = 192  # bytes before and after each array
CANARY = 0xA5


class Maker:
    """make(values, dtype, layout) and make.empty(shape, ...): arrays whose surroundings must not change.

    layout "contract": channels last for 4 axes, else C order; "plain": C order always; "gaps": every second element along the
    last axis of a larger array, the elements between being guards too. An empty array is filled with canary bytes, so that a
    cell that an op forgets does not look right by chance.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self._buffers: list[tuple[Array, int]] = []
        self._gaps: list[tuple[Array, np.ndarray]] = []

    def __call__(self, values: Any, dtype: str = "float32", layout: str = "contract") -> Array:
        values = np.asarray(values)
        array = self.empty(values.shape, dtype, layout)
        self.backend.from_host(values, array)
        return array

    def empty(self, shape: tuple[int, ...], dtype: str = "float32", layout: str = "contract") -> Array:
        if layout == "gaps":
            wide = self.empty((*shape[:-1], 2 * shape[-1]), dtype)
            self._gaps.append((wide[..., 1::2], self._bits(wide[..., 1::2])))
            return wide[..., ::2]
        nbytes = prod(shape) * BYTES[dtype]
        buffer = self.backend.allocate(nbytes + 2 * GUARD)
        self.backend.fill(buffer, CANARY)
        self._buffers.append((buffer, nbytes))
        if layout == "plain":
            return self.backend.view(buffer, GUARD, (prod(shape),), dtype).reshape(shape)
        return self.backend.view(buffer, GUARD, shape, dtype)

    def check(self) -> None:
        """Fails if a byte around an array was written."""
        for buffer, nbytes in self._buffers:
            got = np.array(self.backend.to_host(buffer))
            assert (got[:GUARD] == CANARY).all(), "written before an array's start"
            assert (got[GUARD + nbytes :] == CANARY).all(), "written after an array's end"
        for gap, before in self._gaps:
            assert np.array_equal(self._bits(gap), before), "written between the elements of an array with gaps"

    def host(self, array: Array) -> np.ndarray:
        """The array's values in float64."""
        return np.asarray(self.backend.to_host(array), np.float64)

    def _bits(self, array: Array) -> np.ndarray:
        return np.ascontiguousarray(self.backend.to_host(array)).view(np.uint8)


def assert_close(got: Any, want: Any, dtype: str = "float32", slack: float = 1.0) -> None:
    """Compares with float64 values.

    float32: 1e-5 of each value (sums of up to some thousand terms in any order) and 3e-6 of the largest. bfloat16: 2^-8 of each value,
    one unit in the last place: results are rounded once, inputs are taken as they are stored; and 2^-12 of the largest, for terms that cancel.
    slack widens both.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    finite = np.abs(want[np.isfinite(want)])
    relative, absolute = (1e-5, 3e-6) if dtype == "float32" else (2.0**-8, 2.0**-12)
    np.testing.assert_allclose(got, want, rtol=slack * relative, atol=slack * absolute * finite.max(initial=0))


def rectified(gradient: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """A gradient taken on through the ReLU that put out `positive`."""
    with np.errstate(invalid="ignore"):
        return np.where(positive > 0, gradient, 0 * gradient)


def numeric_gradient(run: Callable[[np.ndarray], np.ndarray], at: np.ndarray, dy: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """The gradient of sum(run(at) * dy) by central differences in float64."""
    gradient = np.zeros(at.shape)
    for index in np.ndindex(at.shape):
        sides = []
        for sign in (1, -1):
            moved = np.array(at, np.float64)
            moved[index] += sign * step
            sides.append(np.sum(run(moved) * dy))
        gradient[index] = (sides[0] - sides[1]) / (2 * step)
    return gradient


def last(values: np.ndarray) -> np.ndarray:
    """The same values with the channels last in memory where there are 4 axes."""
    return np.moveaxis(np.moveaxis(values, 1, -1).copy(), -1, 1) if values.ndim == 4 else values.copy()


def pooled(shape: Shape, kernel: Shape, stride: Shape, pad: Shape, rounding: Callable[[float], int] = ceil) -> Shape:
    """Caffe's extents of what is pooled along the last two axes: rounded up unless told otherwise; clipped only with padding."""
    out = [rounding((s + 2 * p - k) / t) + 1 for s, p, k, t in zip(shape[-2:], pad, kernel, stride)]
    if any(pad):
        out = [o - ((o - 1) * t >= s + p) for o, t, s, p in zip(out, stride, shape[-2:], pad)]
    return (*shape[:-2], *out)


def dropout_key(backend: Any, seed: int, layer: int, iteration: int) -> DropoutKey:
    """The key with its iteration in a cell, where ops look for it."""
    cell = backend.empty((1,), "float64")
    backend.assign(cell, [iteration])
    return DropoutKey(seed, layer, cell)


def drawn_mask(shape: Shape, ratio: float, key: Shape) -> np.ndarray:
    """The mask of a dropout as the contract says it, of key (seed, layer, iteration): 16 bits of NumPy's Philox stream for each element in memory order."""
    count, (seed, layer, iteration) = prod(shape), key
    words = np.random.Philox(key=np.array([seed, layer], np.uint64), counter=np.array([0, 0, iteration, 0], np.uint64)).random_raw(-(-count // 4))
    drawn = np.stack([(words >> np.uint64(s)) & np.uint64(0xFFFF) for s in (0, 16, 32, 48)], axis=1).reshape(-1)[:count] >= round(ratio * 65536)
    return np.moveaxis(drawn.reshape(shape[0], *shape[2:], shape[1]), -1, 1) if len(shape) == 4 else drawn.reshape(shape)


def same_bits(got: np.ndarray, want: np.ndarray) -> None:
    """Fails unless float64 values are equal, signs of zeros and the places of NaN included."""
    np.testing.assert_array_equal(got, want)
    numbers = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(got[numbers]), np.signbit(want[numbers]))
