"""The products behind convolution and inner product: on every tile, in tf32, with split sums, views off a 16-byte boundary, and
the bias gradient beside the weight gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from arrays import DTYPES, assert_close, drawn_mask, dropout_key, rectified, same_bits

from caffelite import backends
from caffelite.backends.contract import Backend, Drop
from caffelite.backends.cuda import gemm_plan
from caffelite.backends.cuda.gemm_plan import (
    GROUP_TILES,
    GROUP_WEIGHT_TILES,
    TENSOR,
    TILES,
    UNITS,
    Tile,
    candidates,
    exact,
)
from caffelite.backends.cuda.gemm_tune import HOPPER
from caffelite.backends.cuda.launch import Module

KINDS = {"float32": "float", "bfloat16": "bf16"}
ONE = {"stride": (1, 1), "pad": (0, 0), "dilation": (1, 1), "group": 1}
TF32_RMS = 2.5e-3  # a largest error, in units of the results' root mean square: 6 standard deviations of two roundings to 10 bits, for any depth


def put(cuda: Backend, values: np.ndarray, dtype: str, offset: int = 0) -> tuple[Any, np.ndarray]:
    """An array `offset` bytes behind a 64-byte boundary, and its values in float64 as stored."""
    size = 2 if dtype == "bfloat16" else 4
    array = cuda.view(cuda.allocate(values.size * size + offset), offset, values.shape, dtype)
    cuda.from_host(values, array)
    return array, np.asarray(cuda.to_host(array), np.float64)


def as_tf32(x: np.ndarray) -> np.ndarray:
    """x (float32) rounded to tf32: 10 bits of mantissa, to nearest, ties away from zero. Written out by multiples of the last place."""
    mantissa, exponent = np.frexp(np.asarray(x, np.float64))  # 0.5 <= |mantissa| < 1: 11 bits with the first one
    return np.ldexp(np.sign(mantissa) * np.floor(np.abs(mantissa) * 2**11 + 0.5), exponent - 11)


@pytest.fixture(params=["float32", "bfloat16", "wgmma", "tma"])
def dtype(cuda: Backend, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What operands are stored in: products of bfloat16 by either unit."""
    return by_unit(cuda, request.param, monkeypatch)


@pytest.fixture(params=["float32", "tf32", "bfloat16", "wgmma", "tma"])
def kind(cuda: Backend, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return by_unit(cuda, request.param, monkeypatch)


def needs_hopper(cuda: Backend) -> None:
    """Skips on a GPU that has no wgmma; the emulator has."""
    facts = cuda.driver.facts()
    if facts and facts.capability != HOPPER:
        pytest.skip(f"{facts.name} has no wgmma")


def by_unit(cuda: Backend, name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    if name in UNITS:
        needs_hopper(cuda)
    monkeypatch.setattr(cuda.tuner, "units", (name if name in UNITS else "mma",))
    return "bfloat16" if name in UNITS else name


@pytest.fixture(params=TILES, ids=lambda tile: f"{tile.rows}x{tile.columns}")
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tile]:
    """Each tile in turn, as the only one to choose from."""
    monkeypatch.setattr(gemm_plan, "TILES", (request.param,))
    gemm_plan.candidates.cache_clear()
    yield request.param
    gemm_plan.candidates.cache_clear()


def test_a_grid_has_one_dimension(cuda: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups and splits, which may be more than the 65,535 of the other two, are counted in the first, which takes 2^31 - 1."""
    grids = []
    monkeypatch.setattr(type(cuda), "launch", lambda self, module, name, grid, *args, **options: grids.append((name.split("<")[0], grid)))
    g, shape = 70_000, (1, 70_000, 3, 1)
    for dtype in DTYPES:
        x, w, dw = cuda.empty(shape, dtype), cuda.empty((g, 1, 1, 1), dtype), cuda.empty((g, 1, 1, 1), "float32")
        options = ONE | {"group": g}
        cuda.convolution_forward(x, w, None, x, **options)
        cuda.convolution_backward_data(x, w, x, **options)
        cuda.convolution_backward_weights(x, x, dw, None, **options, accumulate_w=False, accumulate_b=False)
    main = [grid for name, grid in grids if name.endswith(("_forward", "_data", "_weights"))]
    assert main == [g] * 6


@pytest.fixture(params=GROUP_TILES, ids=lambda tile: f"{tile.rows}x{tile.columns}")
def group_tile(cuda: Backend, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tile]:
    """Each of wgmma's tiles in turn, and one of those of weight gradients, as the only ones to choose from."""
    needs_hopper(cuda)
    number = GROUP_TILES.index(request.param)
    monkeypatch.setattr(cuda.tuner, "units", ("wgmma",))
    monkeypatch.setattr(gemm_plan, "GROUP_TILES", (request.param,))
    monkeypatch.setattr(gemm_plan, "GROUP_WEIGHT_TILES", (GROUP_WEIGHT_TILES[number % len(GROUP_WEIGHT_TILES)],))
    gemm_plan.candidates.cache_clear()
    yield request.param
    gemm_plan.candidates.cache_clear()


def recorded(cuda: Backend, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched from now on."""
    launch, launched = type(cuda).launch, []

    def told(self: Backend, module: Module, kernel: str, *args: Any, **options: Any) -> None:
        launched.append(kernel)
        launch(self, module, kernel, *args, **options)

    monkeypatch.setattr(type(cuda), "launch", told)
    return launched


@pytest.mark.parametrize("kind", TENSOR)
def test_every_tile(cuda: Backend, rng: np.random.Generator, tile: Tile, kind: str) -> None:
    check_tile(cuda, rng, tile, kind)


def test_every_tile_of_warpgroups(cuda: Backend, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, group_tile: Tile) -> None:
    launched = recorded(cuda, monkeypatch)
    check_tile(cuda, rng, group_tile, "bf16")
    made = [kernel for kernel in launched if "mma" in kernel]
    weights = gemm_plan.GROUP_WEIGHT_TILES[0]
    size = f"{group_tile.rows}, {group_tile.columns}"
    assert made == [f"wgmma_forward<{size}>", f"wgmma_data<{size}>", f"wgmma_weights<{weights.rows}, {weights.columns}>"]


@pytest.mark.parametrize("kernel", [(1, 1), (2, 3)])
def test_every_tile_with_boxes(cuda: Backend, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, group_tile: Tile, kernel: tuple[int, int]) -> None:
    """Where pixels are a matrix too, and where only weights and dy are; three tiles down, two across, none of them full; wholes, as in check_tile."""
    monkeypatch.setattr(cuda.tuner, "units", ("tma",))
    launched = recorded(cuda, monkeypatch)
    c, o, wide = group_tile.columns + 8, group_tile.columns + 16, group_tile.rows // 6
    options = {"stride": (1, 1), "pad": (kernel[0] - 1, 0), "dilation": (1, 1), "group": 1}
    out = (7 + kernel[0] - 1, wide - kernel[1] + 1)
    (x, xs), (dy, dys) = (put(cuda, rng.integers(-2, 3, shape), "bfloat16") for shape in ((2, c, 7, wide), (2, o, *out)))
    (w, ws), (b, bs) = put(cuda, rng.integers(-2, 3, (o, c, *kernel)), "bfloat16"), put(cuda, rng.integers(-9, 10, o), "float32")
    y, dx, dw, db = cuda.empty((2, o, *out), "bfloat16"), cuda.empty(x.shape, "bfloat16"), cuda.empty(w.shape, "float32"), cuda.empty((o,), "float32")
    edge = kernel[0] - 1
    padded = np.pad(xs, ((0, 0), (0, 0), (edge, edge), (0, 0)))
    want, want_x, want_w = np.zeros(y.shape) + bs[:, None, None], np.zeros(padded.shape), np.zeros(w.shape)
    for r, s in np.ndindex(*kernel):
        part = (slice(None), slice(None), slice(r, r + out[0]), slice(s, s + out[1]))
        want += np.einsum("nchw,oc->nohw", padded[part], ws[:, :, r, s])
        want_x[part] += np.einsum("nohw,oc->nchw", dys, ws[:, :, r, s])
        want_w[:, :, r, s] = np.einsum("nohw,nchw->oc", dys, padded[part])
    cuda.convolution_forward(x, w, b, y, **options, relu=False)
    cuda.convolution_backward_data(dy, w, dx, **options)
    cuda.convolution_backward_weights(x, dy, dw, db, **options, accumulate_w=False, accumulate_b=False)
    np.testing.assert_array_equal(cuda.to_host(dw), want_w)
    np.testing.assert_array_equal(cuda.to_host(db), dys.sum(axis=(0, 2, 3)))
    assert_close(cuda.to_host(y), want, "bfloat16")
    assert_close(cuda.to_host(dx), want_x[:, :, edge : edge + 7], "bfloat16")
    weights, both = gemm_plan.GROUP_WEIGHT_TILES[0], str(kernel == (1, 1)).lower()
    sizes = [f"{tile.rows}, {tile.columns}, {both}>" for tile in (group_tile, group_tile, weights)]
    assert [name for name in launched if "tma" in name] == [f"tma_{name}<{size}" for name, size in zip(("forward", "data", "weights"), sizes)]


def check_tile(cuda: Backend, rng: np.random.Generator, tile: Tile, kind: str) -> None:
    """Three tiles down, two across, in pixels and channels that fill none; small whole numbers, of which every sum is exact."""
    dtype, tf32 = ("float32", True) if kind == "tf32" else ("bfloat16", False)
    c, o, size = tile.columns + 8, tile.columns + 16, (7, tile.rows // 6)
    options = {"stride": (1, 2), "pad": (1, 0), "dilation": (1, 1), "group": 1}
    out = (7, (size[1] - 2) // 2 + 1)
    (x, xs), (dy, dys) = (put(cuda, rng.integers(-2, 3, shape), dtype) for shape in ((2, c, *size), (2, o, *out)))
    (w, ws), (b, bs) = put(cuda, rng.integers(-2, 3, (o, c, 3, 2)), dtype), put(cuda, rng.integers(-9, 10, o), "float32")
    y, dx, dw = cuda.empty((2, o, *out), dtype), cuda.empty(x.shape, dtype), put(cuda, np.full(w.shape, 3), "float32")[0]
    padded = np.pad(xs, ((0, 0), (0, 0), (1, 1), (0, 0)))
    want, want_x, want_w = np.zeros(y.shape) + bs[:, None, None], np.zeros(padded.shape), np.full(w.shape, 3.0)
    for r in range(3):
        for s in range(2):
            part = (slice(None), slice(None), slice(r, r + 7), slice(s, s + 2 * out[1] - 1, 2))
            want += np.einsum("nchw,oc->nohw", padded[part], ws[:, :, r, s])
            want_x[part] += np.einsum("nohw,oc->nchw", dys, ws[:, :, r, s])
            want_w[:, :, r, s] += np.einsum("nohw,nchw->oc", dys, padded[part])
    cuda.convolution_forward(x, w, b, y, **options, relu=True, tf32=tf32)
    cuda.convolution_backward_data(dy, w, dx, **options, tf32=tf32)
    db = put(cuda, np.full(o, 5), "float32")[0]
    cuda.convolution_backward_weights(x, dy, dw, db, **options, accumulate_w=True, accumulate_b=True, tf32=tf32)
    np.testing.assert_array_equal(cuda.to_host(dw), want_w)
    np.testing.assert_array_equal(cuda.to_host(db), 5 + dys.sum(axis=(0, 2, 3)))
    for got, values in ((y, np.maximum(want, 0)), (dx, want_x[:, :, 1:-1])):
        if tf32:
            np.testing.assert_array_equal(cuda.to_host(got), values)
        else:
            assert_close(cuda.to_host(got), values, dtype)  # bfloat16 rounds whole numbers above 256


@pytest.mark.parametrize("unit", UNITS)
def test_groups_strides_and_dilation(cuda: Backend, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, unit: str) -> None:
    """As the numpy backend has them in float32, of small whole numbers; with a ReLU above and one below."""
    by_unit(cuda, unit, monkeypatch)
    plain, options = backends.get("numpy"), {"stride": (2, 1), "pad": (1, 2), "dilation": (1, 2), "group": 2}
    shapes = {"x": (3, 48, 9, 11), "w": (80, 24, 3, 2), "b": (80,), "y": (3, 80, 5, 13), "dy": (3, 80, 5, 13)}
    values = {name: rng.integers(-2, 3, shape).astype(np.float32) for name, shape in shapes.items()}

    def made(backend: Backend, dtype: str) -> list[np.ndarray]:
        x, w, b, y, dy = (backend.empty(shape, "float32" if name == "b" else dtype) for name, shape in shapes.items())
        for name, array in zip(shapes, (x, w, b, y, dy)):
            backend.from_host(values[name], array)
        dx, dw, db = backend.empty(x.shape, dtype), backend.empty(w.shape, "float32"), backend.empty((80,), "float32")
        backend.convolution_forward(x, w, b, y, **options, relu=True)
        backend.convolution_backward_data(dy, w, dx, x, **options)
        backend.convolution_backward_weights(x, dy, dw, db, **options, accumulate_w=False, accumulate_b=False)
        return [np.asarray(backend.to_host(array), np.float64) for array in (y, dx, dw, db)]

    for got, want, stored in zip(made(cuda, "bfloat16"), made(plain, "float32"), ("bfloat16", "bfloat16", "float32", "float32")):
        assert_close(got, want, stored)


@pytest.mark.parametrize("deep", [75, 1100, 5000])
def test_tf32_against_float64(cuda: Backend, rng: np.random.Generator, deep: int) -> None:
    m, n = 67, 40
    (x, xs), (w, ws), (dy, dys) = (put(cuda, rng.standard_normal(shape), "float32") for shape in ((m, deep), (n, deep), (m, n)))
    y, dx, dw = cuda.empty((m, n), "float32"), cuda.empty((m, deep), "float32"), cuda.empty((n, deep), "float32")
    cuda.inner_product_forward(x, w, None, y, transpose=False, tf32=True)
    cuda.inner_product_backward_data(dy, w, dx, transpose=False, tf32=True)
    cuda.inner_product_backward_weights(x, dy, dw, None, transpose=False, accumulate_w=False, accumulate_b=False, tf32=True)
    for got, want in ((y, xs @ ws.T), (dx, dys @ ws), (dw, dys.T @ xs)):
        error = np.abs(cuda.to_host(got) - want).max() / np.sqrt((want**2).mean())
        assert 1e-5 < error < TF32_RMS, "tf32's, and not float32's"
    rounded = as_tf32(xs) @ as_tf32(ws).T
    assert np.abs(cuda.to_host(y) - rounded).max() < 2e-5 * np.sqrt((rounded**2).mean())


def test_operands_are_rounded_to_nearest_with_ties_away_from_zero(cuda: Backend) -> None:
    one, step = np.float32(1), np.float32(2.0**-10)
    values = [one + step / 2, one + 3 * step / 2, one + step / 2 - 2.0**-23, one + step / 4, 2 - step / 2, np.float32(2.0**100) * (one + step / 2), 1e-39, 0.0]
    x = np.array([values, [-v for v in values]], np.float32)
    (left, _), (unit, _) = put(cuda, x, "float32"), put(cuda, np.eye(8), "float32")
    for transpose in (False, True):
        y = cuda.empty((2, 8), "float32")
        cuda.inner_product_forward(left, unit, None, y, transpose=transpose, tf32=True)
        got = np.asarray(cuda.to_host(y), np.float64)
        np.testing.assert_array_equal(got[:, :6], as_tf32(x[:, :6]))
        assert got[0, 0] == 1 + 2.0**-10
        assert got[0, 2] == 1
        assert got[1, 4] == -2
        assert (np.abs(got[:, 6]) <= 1.1e-39).all()
    dw = cuda.empty((8, 8), "float32")
    cuda.inner_product_backward_weights(unit, put(cuda, np.repeat(x[:1], 8, 0) * np.eye(8), "float32")[0], dw, None, transpose=False, accumulate_w=False,
        accumulate_b=False, tf32=True)  # fmt: skip
    np.testing.assert_array_equal(np.diag(cuda.to_host(dw))[:6], as_tf32(x[0, :6]))


def test_tf32_keeps_what_is_not_finite(cuda: Backend) -> None:
    x = np.array([[np.inf, 0, 0, 0], [0, np.nan, 0, 0], [0, 0, -np.inf, 1]], np.float32)
    y = cuda.empty((3, 1), "float32")
    cuda.inner_product_forward(put(cuda, x, "float32")[0], put(cuda, np.ones((1, 4)), "float32")[0], None, y, transpose=False, tf32=True)
    np.testing.assert_array_equal(cuda.to_host(y)[:, 0], [np.inf, np.nan, -np.inf])


@pytest.mark.parametrize("kind", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize(("channels", "offset"), [(1, 0), (3, 0), (4, 0), (4, 8)])
def test_images(cuda: Backend, rng: np.random.Generator, channels: int, offset: int, kind: str) -> None:
    """A few channels, which tensor cores see padded; more than one tile of pixels, cells that are not whole slices. Pieces of 8 bytes may
    lie off a boundary of 16."""
    dtype = "bfloat16" if kind == "bfloat16" else "float32"
    options = {"stride": (2, 1), "pad": (2, 1), "dilation": (1, 1), "group": 1, "tf32": kind == "tf32"}
    x, xs = put(cuda, rng.integers(-3, 4, (3, channels, 11, 9)), dtype, offset)
    (w, ws), (dy, dys) = (put(cuda, rng.integers(-3, 4, shape), dtype) for shape in ((13, channels, 5, 3), (3, 13, 6, 9)))
    y, dw = cuda.empty((3, 13, 6, 9), dtype), cuda.empty(w.shape, "float32")
    padded = np.pad(xs, ((0, 0), (0, 0), (2, 2), (1, 1)))
    want, want_w = np.zeros(y.shape), np.zeros(w.shape)
    for r in range(5):
        for s in range(3):
            part = padded[:, :, r : r + 11 : 2, s : s + 9]
            want += np.einsum("nchw,oc->nohw", part, ws[:, :, r, s])
            want_w[:, :, r, s] = np.einsum("nohw,nchw->oc", dys, part)
    cuda.convolution_forward(x, w, None, y, **options)
    cuda.convolution_backward_weights(x, dy, dw, None, **options, accumulate_w=False, accumulate_b=False)
    np.testing.assert_array_equal(cuda.to_host(y), want)
    np.testing.assert_array_equal(cuda.to_host(dw), want_w)


@pytest.mark.parametrize("relu", [False, True])
def test_split_sums(cuda: Backend, rng: np.random.Generator, dtype: str, relu: bool) -> None:
    m, n, k = 5, 7, 1100
    plan = exact if dtype == "float32" else lambda **sizes: candidates("bf16", **sizes, units=cuda.tuner.units)[0]
    assert plan(rows=m, columns=n, depth=k, groups=1, outputs=m * n).splits > 1
    (x, xs), (w, ws), (b, bs) = (put(cuda, rng.standard_normal(shape), t) for shape, t in (((m, k), dtype), ((n, k), dtype), ((n,), "float32")))
    y = cuda.empty((m, n), dtype)
    cuda.inner_product_forward(x, w, b, y, transpose=False, relu=relu)
    want = xs @ ws.T + bs
    assert_close(cuda.to_host(y), np.maximum(want, 0) if relu else want, dtype)
    (dy, dys), dx = put(cuda, rng.standard_normal((k, n)), dtype), cuda.empty((k, m), dtype)
    (v, vs) = put(cuda, rng.standard_normal((n, m)), dtype)
    cuda.inner_product_backward_data(dy, v, dx, transpose=False)
    assert_close(cuda.to_host(dx), dys @ vs, dtype)
    (left, lefts), dw = put(cuda, rng.standard_normal((k, m)), dtype), put(cuda, np.full((n, m), 2.0), "float32")[0]
    cuda.inner_product_backward_weights(left, dy, dw, None, transpose=False, accumulate_w=True, accumulate_b=False)
    assert_close(cuda.to_host(dw), 2 + dys.T @ lefts, "float32")


def test_split_sums_go_on_through_a_relu(cuda: Backend, rng: np.random.Generator, dtype: str) -> None:
    (dy, dys), (w, ws), (positive, above) = (put(cuda, rng.standard_normal(shape), dtype) for shape in ((5, 1100), (1100, 7), (5, 7)))
    dx, through = cuda.empty((5, 7), dtype), cuda.empty((5, 7), dtype)
    cuda.inner_product_backward_data(dy, w, dx, transpose=False)
    assert_close(cuda.to_host(dx), dys @ ws, dtype)
    cuda.inner_product_backward_data(dy, w, through, positive, transpose=False)
    np.testing.assert_array_equal(cuda.to_host(through), rectified(np.asarray(cuda.to_host(dx)), above))


@pytest.mark.parametrize("odd", ["x", "w", "y"])
def test_views_off_a_vector_boundary(cuda: Backend, rng: np.random.Generator, dtype: str, odd: str) -> None:
    offsets = {name: 4 if name == odd else 0 for name in "xwy"}
    x, xs = put(cuda, rng.standard_normal((2, 16, 3, 3)), dtype, offsets["x"])
    w, ws = put(cuda, rng.standard_normal((8, 16, 1, 1)), dtype, offsets["w"])
    y, _ = put(cuda, np.zeros((2, 8, 3, 3)), dtype, offsets["y"])
    cuda.convolution_forward(x, w, None, y, **ONE)
    assert_close(cuda.to_host(y), np.einsum("nchw,oc->nohw", xs, ws[:, :, 0, 0]), dtype)
    dx, dw = cuda.empty((2, 16, 3, 3), dtype), cuda.empty((8, 16, 1, 1), "float32")
    ys = np.asarray(cuda.to_host(y), np.float64)
    cuda.convolution_backward_data(y, w, dx, **ONE)
    assert_close(cuda.to_host(dx), np.einsum("nohw,oc->nchw", ys, ws[:, :, 0, 0]), dtype)
    cuda.convolution_backward_weights(x, y, dw, None, **ONE, accumulate_w=False, accumulate_b=False)
    assert_close(cuda.to_host(dw)[:, :, 0, 0], np.einsum("nohw,nchw->oc", ys, xs), "float32")


def test_a_sum_of_nothing_is_zero(cuda: Backend, dtype: str) -> None:
    x, dy, dw = cuda.empty((0, 3, 5, 5), dtype), cuda.empty((0, 4, 5, 5), dtype), put(cuda, np.ones((4, 3, 1, 1)), "float32")[0]
    cuda.convolution_forward(x, put(cuda, np.ones((4, 3, 1, 1)), dtype)[0], None, dy, **ONE)
    for db in (None, put(cuda, np.ones(4), "float32")[0]):
        cuda.convolution_backward_weights(x, dy, dw, db, **ONE, accumulate_w=False, accumulate_b=False)
        assert not cuda.to_host(dw).any()
    assert not cuda.to_host(db).any()
    cuda.fill(db, 3)
    cuda.convolution_backward_weights(x, dy, dw, db, **ONE, accumulate_w=False, accumulate_b=True)
    np.testing.assert_array_equal(cuda.to_host(db), 3)


class Biases(NamedTuple):
    """A convolution by its gradient of the bias; split: whether its sums over pixels are."""

    batch: int
    channels: int
    outputs: int
    size: tuple[int, ...]
    kernel: int
    group: int
    split: bool


BIASES = {
    "one split": Biases(2, 6, 9, (3, 3), 1, 1, False),
    "several tiles of columns": Biases(2, 16, 13, (5, 7), 5, 1, False),
    "several tiles of columns, split": Biases(5, 16, 13, (23, 11), 5, 1, True),
    "groups": Biases(2, 6, 9, (5, 5), 3, 3, False),
    "groups, split": Biases(5, 4, 6, (17, 19), 1, 2, True),
    "groups of whole vectors": Biases(3, 32, 32, (23, 17), 3, 2, True),
    "more outputs than a block has": Biases(3, 3, 211, (23, 29), 1, 1, True),
    "one axis": Biases(3, 5, 7, (401,), 3, 1, True),
}


@pytest.mark.parametrize("name", BIASES)
def test_the_bias_gradient_is_summed_beside_the_weights(cuda: Backend, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    c, dtype, axes = BIASES[name], "bfloat16" if kind == "bfloat16" else "float32", len(BIASES[name].size)
    launched = recorded(cuda, monkeypatch)
    monkeypatch.setattr(type(cuda), "bias_backward", None)  # no second pass over dy
    options = {"stride": (1,) * axes, "pad": (c.kernel // 2,) * axes, "dilation": (1,) * axes, "group": c.group, "tf32": kind == "tf32"}
    x, dy = (put(cuda, 1 + rng.standard_normal((c.batch, channels, *c.size)), dtype)[0] for channels in (c.channels, c.outputs))
    want = np.asarray(cuda.to_host(dy), np.float64).sum(axis=(0, *range(2, 2 + axes)))
    shape = (c.outputs, c.channels // c.group, *(c.kernel,) * axes)
    alone, dw, db = cuda.empty(shape, "float32"), cuda.empty(shape, "float32"), put(cuda, np.full(c.outputs, 2.0), "float32")[0]
    cuda.convolution_backward_weights(x, dy, alone, None, **options, accumulate_w=False, accumulate_b=False)
    for more, times in ((True, 1), (True, 2), (False, 1)):
        cuda.convolution_backward_weights(x, dy, dw, db, **options, accumulate_w=False, accumulate_b=more)
        assert_close(cuda.to_host(db), times * want + 2 * more)  # float32's tolerance, in tf32 too
        np.testing.assert_array_equal(cuda.to_host(dw), cuda.to_host(alone))  # and dw is what it is without
    cuda.convolution_backward_weights(x, dy, dw, db, **options, accumulate_w=True, accumulate_b=False)
    assert_close(cuda.to_host(db), want)
    assert_close(cuda.to_host(dw), 2.0 * cuda.to_host(alone))
    assert ("gemm_weights_finish" in launched) == c.split


@pytest.mark.parametrize("slices", [5, 61])
def test_slices_and_splits_of_the_bias_gradient_are_added_in_double(cuda: Backend, kind: str, slices: int) -> None:
    """2^30, small numbers that float would lose beside it, and -2^30."""
    dtype, rows = "bfloat16" if kind == "bfloat16" else "float32", 32 * slices
    values = np.ones((rows, 7)) * np.arange(1, 8)
    values[:33] = values[-33:] = 0
    values[0], values[-1] = 2.0**30, -(2.0**30)
    (dy, _), (x, _) = put(cuda, values, dtype), put(cuda, np.ones((rows, 3)), dtype)
    dw, db = cuda.empty((7, 3), "float32"), cuda.empty((7,), "float32")
    cuda.inner_product_backward_weights(x, dy, dw, db, transpose=False, accumulate_w=False, accumulate_b=False, tf32=kind == "tf32")
    np.testing.assert_array_equal(cuda.to_host(db), (rows - 66) * np.arange(1, 8))


def test_a_bias_gradient_that_is_not_finite_stays_in_its_place(cuda: Backend, kind: str) -> None:
    values = np.ones((40, 5))
    values[3, 1], values[35, 2], values[2, 3], values[36, 3] = np.inf, np.nan, np.inf, -np.inf
    dtype = "bfloat16" if kind == "bfloat16" else "float32"
    (dy, _), (x, _) = put(cuda, values, dtype), put(cuda, np.ones((40, 3)), dtype)
    dw, db = cuda.empty((5, 3), "float32"), cuda.empty((5,), "float32")
    cuda.inner_product_backward_weights(x, dy, dw, db, transpose=False, accumulate_w=False, accumulate_b=False, tf32=kind == "tf32")
    np.testing.assert_array_equal(cuda.to_host(db), [40, np.inf, np.nan, np.nan, 40])


class Dropped(NamedTuple):
    """x and w, and what the convolution of them is; split: whether its sums are."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    stride: tuple[int, int]
    pad: tuple[int, int]
    group: int
    split: bool


DROPPED = {
    "whole vectors": Dropped((67, 40, 1, 1), (48, 40, 1, 1), (1, 1), (0, 0), 1, False),
    "odd rows": Dropped((67, 24, 1, 1), (37, 24, 1, 1), (1, 1), (0, 0), 1, False),
    "whole vectors, split": Dropped((16, 1100, 1, 1), (48, 1100, 1, 1), (1, 1), (0, 0), 1, True),
    "odd rows, split": Dropped((5, 1100, 1, 1), (7, 1100, 1, 1), (1, 1), (0, 0), 1, True),
    "several warps, split": Dropped((35, 1100, 1, 1), (47, 1100, 1, 1), (1, 1), (0, 0), 1, True),
    "windows": Dropped((2, 16, 9, 7), (24, 16, 3, 2), (1, 1), (1, 0), 1, False),
    "windows in groups, classes": Dropped((2, 12, 9, 7), (22, 6, 3, 3), (2, 1), (1, 1), 2, False),
    "an image": Dropped((2, 3, 9, 11), (13, 3, 5, 3), (2, 1), (2, 1), 1, False),
}


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("name", DROPPED)
def test_what_leaves_is_dropped(cuda: Backend, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, name: str, relu: bool, kind: str) -> None:
    """Bit for bit as by a pass of its own, by the mask that the contract says."""
    c, dtype, key, ratio = DROPPED[name], "bfloat16" if kind == "bfloat16" else "float32", (2**63 + 5, 7, 2**40), 0.3
    options = {"stride": c.stride, "pad": c.pad, "dilation": (1, 1), "group": c.group, "tf32": kind == "tf32"}
    out = tuple((size + 2 * pad - kernel) // step + 1 for size, pad, kernel, step in zip(c.x[2:], c.pad, c.w[2:], c.stride))
    shape, drop = (c.x[0], c.w[0], *out), Drop(ratio, dropout_key(cuda, *key))
    x, w = (put(cuda, rng.standard_normal(shape), dtype)[0] for shape in (c.x, c.w))
    b, y, want, mask = put(cuda, rng.standard_normal(c.w[0]), "float32")[0], *(cuda.empty(shape, kind) for kind in (dtype, dtype, "uint8"))
    launched = recorded(cuda, monkeypatch)
    cuda.convolution_forward(x, w, b, y, **options, relu=relu, drop=drop)
    assert (f"gemm_finish_dropout<{'float' if dtype == 'float32' else 'bf16'}>" in launched) == c.split
    assert not any(kernel.startswith("dropout") for kernel in launched)
    cuda.convolution_forward(x, w, b, want, **options, relu=relu)
    cuda.dropout_forward(want, want, mask, ratio=ratio, key=drop.key)
    np.testing.assert_array_equal(cuda.to_host(mask), drawn_mask(shape, ratio, key))
    same_bits(np.asarray(cuda.to_host(y), np.float64), np.asarray(cuda.to_host(want), np.float64))


@pytest.mark.parametrize("name", DROPPED)
def test_a_gradient_goes_on_through_dropout(cuda: Backend, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    """Bit for bit as by a pass of its own, of the mask that `positive` shows; of products whose sums are split where forward's are."""
    c, dtype, ratio = DROPPED[name], "bfloat16" if kind == "bfloat16" else "float32", 0.3
    options = {"stride": c.stride, "pad": c.pad, "dilation": (1, 1), "group": c.group, "tf32": kind == "tf32"}
    if c.split:  # the depth of a data gradient are the outputs
        c = c._replace(x=(c.x[0], c.w[0], 1, 1), w=(c.x[1], c.w[0], 1, 1))
    out = tuple((size + 2 * pad - kernel) // step + 1 for size, pad, kernel, step in zip(c.x[2:], c.pad, c.w[2:], c.stride))
    dy, w, above = (put(cuda, rng.standard_normal(shape), dtype)[0] for shape in ((c.x[0], c.w[0], *out), c.w, c.x))
    mask, dx, want = cuda.empty(c.x, "uint8"), cuda.empty(c.x, dtype), cuda.empty(c.x, dtype)
    cuda.relu_forward(above, above, slope=0.0)
    cuda.dropout_forward(above, above, mask, ratio=ratio, key=dropout_key(cuda, 3, 5, 7))
    launched = recorded(cuda, monkeypatch)
    cuda.convolution_backward_data(dy, w, dx, above, **options, ratio=ratio)
    assert any(kernel.startswith("gemm_finish") for kernel in launched) == c.split
    assert not any(kernel.startswith("dropout") for kernel in launched)
    cuda.convolution_backward_data(dy, w, want, **options)
    cuda.dropout_backward(want, mask, want, above, ratio=ratio)
    same_bits(np.asarray(cuda.to_host(dx), np.float64), np.asarray(cuda.to_host(want), np.float64))
    assert 0.1 < (np.asarray(cuda.to_host(dx), np.float64) != 0).mean() < 0.6
