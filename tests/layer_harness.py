"""Runs one layer by itself, with everything it must not read poisoned.

A Rig builds a layer from prototxt text and gives it blobs, parameters and buffers on a backend. Before forward all memory but the bottoms'
data holds NaN (integers: 77); before backward so does the data that `backward_reads` does not name and every buffer that is
not kept. What it names as SIGN keeps no more than its sign. A layer that reads what it has not declared gives NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from caffelite.backends.contract import Backend
from caffelite.backends.numpy import NumpyBackend
from caffelite.blob import Blob, Param
from caffelite.errors import SpecError
from caffelite.layer import BOTTOM, SIGN, TOP, Layer, create_layer
from caffelite.schema import net_from_text, pb

FILE = "net.prototxt"


def make_layer(text: str, *, bottoms: int = 1, tops: int = 1, phase: int = pb.TRAIN, in_place: bool = False) -> Layer:
    """A layer named "l"; `text` holds its type and fields. Its bottoms are b0, b1..., its tops t0, t1... (in place: b0)."""
    names = " ".join([f'bottom: "b{i}"' for i in range(bottoms)] + [f'top: "{"b0" if in_place and j == 0 else f"t{j}"}"' for j in range(tops)])
    spec = net_from_text(f'layer {{ name: "l" {names}\n{text}\n}}', FILE)
    return create_layer(spec.param.layer[0], phase, spec.where.child("layer", 0))


def refusal(text: str, shapes: Sequence[tuple[int, ...]] = ((2, 3, 4, 5),), *, tops: int = 1, phase: int = pb.TRAIN) -> str:
    """The SpecError for a layer over bottoms of `shapes`. A "@" in `text` marks the field that must be named as its place."""
    lines = text.split("\n")
    at = [(i + 2, line.index("@") + 1) for i, line in enumerate(lines) if "@" in line]

    def build() -> None:
        make_layer(text.replace("@", ""), bottoms=len(shapes), tops=tops, phase=phase).infer_shapes(list(shapes))

    with pytest.raises(SpecError) as caught:
        build()
    error = caught.value
    assert error.layer == "l"
    assert error.hint
    if at:
        assert error.where is not None
        assert (error.where.file, error.where.line, error.where.column) == (FILE, *at[0]), str(error)
    return str(error)


def shapes_of(text: str, *bottoms: tuple[int, ...], tops: int = 1, phase: int = pb.TRAIN) -> list[tuple[int, ...]]:
    """Shapes of the tops."""
    return make_layer(text, bottoms=len(bottoms), tops=tops, phase=phase).infer_shapes(list(bottoms))


class Rig:
    """A layer on a backend, over the given bottom values and parameter values (fillers' shapes are checked, not their values)."""

    def __init__(
        self,
        backend: Backend,
        text: str,
        values: Sequence[np.ndarray],
        params: Sequence[np.ndarray] = (),
        *,
        tops: int = 1,
        phase: int = pb.TRAIN,
        in_place: bool = False,
        dtype: str = "float32",
        bottom_types: Sequence[str] = (),
    ) -> None:
        self.ops, self.dtype = backend, dtype
        self.layer = make_layer(text, bottoms=len(values), tops=tops, phase=phase, in_place=in_place)
        shapes, types = [v.shape for v in values], list(bottom_types) or [dtype] * len(values)
        self.bottoms = [self._blob(f"b{i}", shape, t) for i, (shape, t) in enumerate(zip(shapes, types))]
        top_types = [self._wide(t) for t in self.layer.top_dtypes(types, dtype)]
        self.tops = [self._blob(f"t{j}", shape, t) for j, (shape, t) in enumerate(zip(self.layer.infer_shapes(shapes), top_types))]
        if in_place:
            self.tops[0] = self.bottoms[0]
        if self.layer.shares_data:
            for top in self.tops:
                top.data = self.bottoms[0].data
        self.specs = self.layer.buffer_specs(shapes, types, backend)
        self.layer.buffers = {name: self._empty(spec.shape, self._wide(spec.dtype)) for name, spec in self.specs.items()}
        self.layer.params = [self._param(i, value) for i, value in enumerate(params)]
        assert [spec.shape for spec in self.layer.param_specs(shapes)] == [value.shape for value in params]
        self.set(values)

    def _wide(self, dtype: str) -> str:
        return "float64" if self.dtype == "float64" and dtype == "float32" else dtype

    def _empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        array = self.ops.empty(shape, dtype)
        self.ops.fill(array, 77 if dtype in ("uint8", "int32") else float("nan"))
        return array

    def _blob(self, name: str, shape: tuple[int, ...], dtype: str) -> Blob:
        return Blob(name, shape, dtype, self._empty(shape, dtype), self._empty(shape, dtype))

    def _param(self, index: int, value: np.ndarray) -> Param:
        stored = self._wide("float32")
        used = "bfloat16" if self.dtype == "bfloat16" and value.ndim > 1 else stored  # as the parameter arena has it
        param = Param(f"l/{index}", value.shape, used, self._empty(value.shape, used), self._empty(value.shape, stored))
        param.master, param.accumulate = param.data, False
        self.ops.from_host(value, param.data)
        return param

    def set(self, values: Sequence[np.ndarray]) -> None:
        for blob, value in zip(self.bottoms, values):
            self.ops.from_host(value, blob.data)

    def host(self, array: Any) -> np.ndarray:
        """float64 values; the backend's own to_host would round float64 arrays."""
        return np.array(array, np.float64) if self.dtype == "float64" else np.array(self.ops.to_host(array), np.float64)

    def forward(self) -> list[np.ndarray]:
        context = self.layer.context
        context.pass_number = self.ops.empty((1,), "float64")
        self.ops.assign(context.pass_number, [context.forward_count])
        self.layer.feed(self.ops, self.tops)
        self.layer.forward(self.ops, self.bottoms, self.tops)
        return [self.host(top.data) for top in self.tops]

    def backward(self, *dtops: np.ndarray | float, down: Sequence[bool] | None = None, poison: bool = True) -> list[np.ndarray]:
        """Bottom gradients (NaN where none was asked for) for the given top gradients."""
        if poison:
            self._poison()
        for top, value in zip(self.tops, dtops):
            self.ops.from_host(np.asarray(value, np.float64).reshape(top.shape), top.diff)
        self.layer.backward(self.ops, self.tops, down or [True] * len(self.bottoms), self.bottoms)
        return [self.host(bottom.diff) for bottom in self.bottoms]

    def gradients(self) -> list[np.ndarray]:
        return [self.host(param.diff) for param in self.layer.params]

    def _poison(self) -> None:
        reads, nan = self.layer.backward_reads(), float("nan")
        shared = self.tops and (self.tops[0] is self.bottoms[0] or self.layer.shares_data)
        if not self.layer.is_source and BOTTOM not in reads and not (shared and reads):
            for bottom in self.bottoms:
                self.ops.fill(bottom.data, nan)
        for top in self.tops:
            if not reads & {TOP, SIGN} and not (shared and BOTTOM in reads):
                self.ops.fill(top.data, nan)
            elif TOP not in reads:
                self.ops.from_host(np.where(self.host(top.data) > 0, 3.0, 0.0), top.data)
        for name, spec in self.specs.items():
            if not spec.kept:
                self.ops.fill(self.layer.buffers[name], 77 if spec.dtype == "uint8" else nan)


def close(got: np.ndarray, want: np.ndarray, tolerance: float = 2e-5) -> None:
    """Equal within `tolerance` of the largest wanted value; NaN and infinity in the same places."""
    want = np.asarray(want, np.float64)
    assert got.shape == want.shape
    finite = np.abs(want[np.isfinite(want)])
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * (1 + finite.max(initial=0)))


def check_gradient(
    text: str,
    values: Sequence[np.ndarray],
    params: Sequence[np.ndarray] = (),
    *,
    check: Sequence[int] | None = None,
    step: float = 1e-4,
    **options: Any,
) -> None:
    """Holds backward against central differences, in float64 on the NumPy backend, for bottoms `check` (all by default) and every parameter.

    The objective is sum_j w_j . top_j with fixed random w_j. `values` must keep clear of kinks by more than `step`.
    """
    rng, backend = np.random.default_rng(5), NumpyBackend()
    check = range(len(values)) if check is None else check

    rig = Rig(backend, text, values, params, dtype="float64", **options)
    weights = [rng.uniform(0.5, 2, top.shape) for top in rig.tops]

    def objective() -> float:
        rig.set(values)
        for param, value in zip(rig.layer.params, params):
            backend.from_host(value, param.data)
        return sum(float((w * y).sum()) for w, y in zip(weights, rig.forward()))

    objective()
    dbottoms = rig.backward(*weights, down=[i in check for i in range(len(values))])
    analytic = [(f"bottom {i}", v, dbottoms[i]) for i, v in enumerate(values) if i in check]
    analytic += [(f"parameter {i}", p, g) for i, (p, g) in enumerate(zip(params, rig.gradients()))]
    for name, array, gradient in analytic:
        numeric = np.empty(array.shape)
        for place in np.ndindex(array.shape):
            kept, ends = array[place], []
            for sign in (1, -1):
                array[place] = kept + sign * step
                ends.append(objective())
            array[place] = kept
            numeric[place] = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-6, err_msg=name)


def clear_of_zero(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random values of both signs, at least 0.1 away from 0."""
    return rng.uniform(0.1, 1.5, shape) * rng.choice([-1, 1], shape)


def all_different(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random values at least 0.01 apart from each other and from 0."""
    count = int(np.prod(shape))
    return (rng.permutation(count).reshape(shape) - count / 2 + 0.5) * 0.013
