"""Convolution of blobs that are channels of larger ones, by every unit: the bits of blobs of their own, and nothing else is written."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import numpy as np
import pytest
from arrays import dropout_key
from test_cuda_gemm import by_unit, put, recorded

from caffelite.backends.contract import Backend, Drop


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


# Channels that are no whole pieces, or of one group among others: the op copies.
COPIED = {
    "odd channels": (Plane(3, 7, 5, (5, 7), (1, 1), (1, 1), (0, 0)), 1),
    "one channel": (Plane(2, 1, 3, (5, 7), (3, 3), (2, 2), (1, 1)), 1),
    "groups": (Plane(2, 16, 32, (5, 7), (3, 3), (1, 1), (1, 1)), 2),
}


BLOBS = ("x", "y", "dx", "dy", "positive")


class Case(NamedTuple):
    """How a convolution is run: its groups, dropout after each of its ReLUs, the channels before each part, and the blobs that are parts."""

    group: int = 1
    drop: Drop | None = None
    before: int = 8
    parts: tuple[str, ...] = BLOBS


PARTS = Case()


def run(cuda: Backend, rng: np.random.Generator, kind: str, plane: Plane, case: Case) -> tuple[list[str], list[np.ndarray]]:
    """The kernels of the three ops; and y, dx, dw and db, with a ReLU above and one below, and gradients added to. What parts lie in must stay."""
    dtype, before, after = "float32" if kind == "tf32" else kind, case.before, 24 - case.before
    options: dict[str, Any] = {"stride": plane.stride, "pad": plane.pad, "dilation": (1, 1), "group": case.group, "tf32": kind == "tf32"}
    shapes = {"x": (plane.batch, plane.channels, *plane.size), "y": (plane.batch, plane.outputs, *plane.out)}
    wholes, part = [], {}
    for name in BLOBS:
        n, channels, *size = shape = shapes["y" if name.endswith("y") else "x"]
        wholes.append(put(cuda, np.full((n, before + channels + after, *size), 7.5), dtype)[0])
        part[name] = wholes[-1][:, before : before + channels] if name in case.parts else cuda.empty(shape, dtype)
        cuda.from_host(rng.standard_normal(shape), part[name])
    w, _ = put(cuda, rng.standard_normal((plane.outputs, plane.channels // case.group, *plane.kernel)), dtype)
    b, _ = put(cuda, rng.standard_normal(plane.outputs), "float32")
    dw, db = put(cuda, np.ones(w.shape), "float32")[0], put(cuda, np.ones(b.shape), "float32")[0]
    with pytest.MonkeyPatch.context() as patch:
        launched = recorded(cuda, patch)
        cuda.convolution_forward(part["x"], w, b, part["y"], **options, relu=True, drop=case.drop)
        cuda.convolution_backward_data(part["dy"], w, part["dx"], part["positive"], **options, ratio=case.drop and case.drop.ratio)
        cuda.convolution_backward_weights(part["x"], part["dy"], dw, db, **options, accumulate_w=True, accumulate_b=True)
    for whole in wholes:
        others = np.asarray(cuda.to_host(whole))
        assert (others[:, :before] == 7.5).all()
        assert (others[:, -after:] == 7.5).all()
    return launched, [np.asarray(cuda.to_host(array)) for array in (part["y"], part["dx"], dw, db)]


def both(cuda: Backend, request: pytest.FixtureRequest, kind: str, plane: Plane, within: Case = PARTS) -> list[list[str]]:
    """The kernels for blobs of their own and for parts, whose results are equal."""
    seed = zlib.crc32(request.node.name.encode())
    (alone, want), (launched, got) = (run(cuda, np.random.default_rng(seed), kind, plane, case) for case in (within._replace(parts=()), within))
    assert np.abs(want[0]).max() > 0
    for array, other in zip(got, want):
        np.testing.assert_array_equal(array, other)
    return [alone, launched]


@pytest.mark.parametrize("name", PLANES)
def test_gaps_between_pixels(cuda: Backend, request: pytest.FixtureRequest, kind: str, name: str) -> None:
    alone, within = both(cuda, request, kind, PLANES[name])
    assert within == alone
    assert any("finish" in kernel for kernel in within) == ("split" in name)


@pytest.mark.parametrize("kind", ["float32", "tf32"])
def test_gaps_between_pixels_of_an_image(cuda: Backend, request: pytest.FixtureRequest, kind: str) -> None:
    """Of 4 channels, which float32 adds in Caffe's order."""
    alone, within = both(cuda, request, kind, Plane(2, 4, 12, (5, 7), (3, 2), (2, 1), (1, 0)))
    assert within == alone


@pytest.mark.parametrize("name", COPIED)
def test_parts_that_are_copied(cuda: Backend, request: pytest.FixtureRequest, kind: str, name: str) -> None:
    plane, group = COPIED[name]
    alone, within = both(cuda, request, kind, plane, Case(group))
    assert [kernel for kernel in within if not kernel.startswith("copy")] == alone
    assert sum(kernel.startswith("copy") for kernel in within) == 3 + 4 + 2  # of the three ops: all activations, and back what is written


@pytest.mark.parametrize("name", ["1x1", "3x2"])
def test_parts_that_begin_within_a_piece_are_copied(cuda: Backend, request: pytest.FixtureRequest, kind: str, name: str) -> None:
    """Eight bytes after its boundary, or four: not where 16 bytes are copied at once."""
    alone, within = both(cuda, request, kind, PLANES[name], Case(before=2))
    assert [kernel for kernel in within if not kernel.startswith("copy")] == alone
    assert sum(kernel.startswith("copy") for kernel in within) == 3 + 4 + 2


@pytest.mark.parametrize("parts", [("dx",), ("positive",)])
def test_signs_that_lie_otherwise_than_their_gradient(cuda: Backend, request: pytest.FixtureRequest, kind: str, parts: tuple[str, ...]) -> None:
    """Kernels know one place of an element for both."""
    alone, within = both(cuda, request, kind, PLANES["3x2"], Case(parts=parts))
    assert [kernel for kernel in within if not kernel.startswith("copy")] == alone


@pytest.mark.parametrize("name", ["1x1", "3x2", "split sums", "a split data gradient"])
def test_dropout(cuda: Backend, request: pytest.FixtureRequest, kind: str, name: str) -> None:
    """The mask of the one above is that of a blob of its own, as which it is made and then copied; the factor of the one below needs no copy."""
    drop = Drop(0.4, dropout_key(cuda, 3, 5, 2))
    alone, within = both(cuda, request, kind, PLANES[name], Case(drop=drop))
    assert len(within) > len(alone)
