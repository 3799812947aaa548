"""Convolution of blobs that are channels of larger ones, by every unit: the bits of blobs of their own, and nothing else is written."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from test_cuda_gemm import by_unit, put, recorded

from caffelite.backends.contract import Backend


@pytest.fixture(params=["float32", "tf32", "bfloat16", "wgmma", "tma"])
def kind(cuda: Backend, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return by_unit(cuda, request.param, monkeypatch)


class Plane(NamedTuple):
    """A convolution: batch, channels of x and of y, extents of x; kernel, stride, pad."""

    batch: int
    channels: int
    outputs: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    pad: tuple[int, int]

    @property
    def out(self) -> tuple[int, ...]:
        return tuple((size + 2 * pad - kernel) // stride + 1 for size, kernel, stride, pad in zip(self.size, self.kernel, self.stride, self.pad))


PLANES = {
    "1x1": Plane(3, 16, 24, (5, 7), (1, 1), (1, 1), (0, 0)),
    "3x2": Plane(2, 8, 40, (5, 7), (3, 2), (1, 1), (1, 0)),
    "stride": Plane(2, 24, 16, (7, 5), (3, 3), (2, 1), (1, 1)),
    "a line": Plane(3, 16, 8, (1, 7), (1, 1), (1, 1), (0, 0)),
    "a column": Plane(3, 16, 8, (5, 1), (1, 1), (1, 1), (0, 0)),
    "a pixel each": Plane(5, 16, 8, (1, 1), (1, 1), (1, 1), (0, 0)),
    "split sums": Plane(1, 1104, 8, (2, 1), (1, 1), (1, 1), (0, 0)),
    "a split data gradient": Plane(1, 8, 1104, (2, 1), (1, 1), (1, 1), (0, 0)),
    "a split weight gradient": Plane(3, 8, 8, (23, 17), (1, 1), (1, 1), (0, 0)),
}


@pytest.mark.parametrize("name", PLANES)
def test_gaps_between_pixels(cuda: Backend, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, kind: str, name: str) -> None:
    """Activations that are channels of larger blobs: the bits are those of blobs of their own, the same kernels make them, and no other channel
    changes."""
    plane, dtype = PLANES[name], "float32" if kind == "tf32" else kind
    options: dict[str, Any] = {"stride": plane.stride, "pad": plane.pad, "dilation": (1, 1), "group": 1, "tf32": kind == "tf32"}
    shapes = {"x": (plane.batch, plane.channels, *plane.size), "y": (plane.batch, plane.outputs, *plane.out)}
    values = {array: rng.standard_normal(shapes[array[-1]]) for array in ("x", "y", "dx", "dy", "px")}
    (w, _), (b, _) = (
        put(cuda, rng.standard_normal((plane.outputs, plane.channels, *plane.kernel)), dtype),
        put(cuda, rng.standard_normal(plane.outputs), "float32"),
    )
    before, after, results = 8, 16, []
    for inside in (False, True):
        whole, part = {}, {}
        for array, given in values.items():
            n, channels, *size = given.shape
            whole[array] = put(cuda, np.full((n, before + channels + after, *size), 7.5), dtype)[0]
            part[array] = whole[array][:, before : before + channels] if inside else cuda.empty(given.shape, dtype)
            cuda.from_host(given, part[array])
        dw, db = put(cuda, np.ones(w.shape), "float32")[0], put(cuda, np.ones(b.shape), "float32")[0]
        with monkeypatch.context() as patch:
            launched = recorded(cuda, patch)
            cuda.convolution_forward(part["x"], w, b, part["y"], **options, relu=True)
            cuda.convolution_backward_data(part["dy"], w, part["dx"], part["px"], **options)
            cuda.convolution_backward_weights(part["x"], part["dy"], dw, db, **options, accumulate_w=True, accumulate_b=True)
        results.append([launched, *(np.asarray(cuda.to_host(array)) for array in (part["y"], part["dx"], dw, db))])
        for array in whole.values():
            others = np.asarray(cuda.to_host(array))
            assert (others[:, :before] == 7.5).all()
            assert (others[:, len(others[0]) - after :] == 7.5).all()
    alone, within = results
    assert within[0] == alone[0]
    assert np.abs(alone[1]).max() > 0
    for got, want in zip(within[1:], alone[1:]):
        np.testing.assert_array_equal(got, want)
    split = [kernel for kernel in within[0] if "finish" in kernel]
    assert bool(split) == ("split" in name)
