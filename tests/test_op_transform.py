"""Images as records hold them, cropped, mirrored, centred and scaled: the bits of a loop over single pixels, on every backend: stem transform."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from arrays import DTYPES

RECORDS = 4
SIZES = [((3, 7, 11), (5, 7)), ((3, 8, 8), (8, 8)), ((1, 5, 9), (5, 3)), ((4, 6, 5), (3, 4)), ((2, 1, 1), (1, 1))]


def expected(planes: np.ndarray, places: np.ndarray, mean: np.ndarray | None, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """One pixel at a time, each operation rounded to float32."""
    channels, width = shape[1], shape[3]
    y = np.empty(shape, np.float32)
    for n, c, h, w in np.ndindex(*shape):
        record, top, left, mirrored = places[n]
        row, column = top + h, left + (width - 1 - w if mirrored else w)
        value = np.float32(planes[record * channels + c, row, column])
        if mean is not None:
            value = np.float32(value - mean[c, row if mean.shape[1] > 1 else 0, column if mean.shape[2] > 1 else 0])
        y[n, c, h, w] = np.float32(value * np.float32(scale))
    return y


def places_for(rng: np.random.Generator, count: int, rows: int, columns: int) -> np.ndarray:
    """Records in any order, some twice; crops over all places; both sides."""
    drawn = [rng.integers(0, RECORDS, count), rng.integers(0, rows + 1, count), rng.integers(0, columns + 1, count), rng.permutation(np.arange(count) % 2)]
    return np.stack(drawn, 1).astype(np.int32)


@pytest.mark.parametrize("layout", ["contract", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", ["none", "values", "image"])
@pytest.mark.parametrize(("stored", "cropped"), SIZES, ids=str)
def test_against_single_pixels(backend: Any, make: Any, rng: np.random.Generator, stored: tuple, cropped: tuple, mean: str, dtype: str, layout: str) -> None:
    channels, height, width = stored
    count, scale = 7, 0.0173
    shape = (count, channels, *cropped)
    planes = rng.integers(0, 256, (RECORDS * channels, height, width)).astype(np.uint8)
    places = places_for(rng, count, height - cropped[0], width - cropped[1])
    means = {"none": None, "values": rng.uniform(0, 255, (channels, 1, 1)), "image": rng.uniform(0, 255, stored)}[mean]
    means = None if means is None else means.astype(np.float32)
    y = make.empty(shape, dtype, layout)
    backend.transform(make(planes, "uint8"), make(places, "int32"), None if means is None else make(means), y, scale=scale)
    want = expected(planes, places, means, shape, scale)
    want = want if dtype == "float32" else want.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(backend.to_host(y), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_output_that_does_not_begin_on_16_bytes(backend: Any, make: Any, rng: np.random.Generator, dtype: str) -> None:
    planes, places = rng.integers(0, 256, (RECORDS * 3, 4, 5)).astype(np.uint8), places_for(rng, 3, 1, 2)
    wide = make(np.zeros((4, 3, 3, 3)), dtype)  # an image of 27 values: the second does not begin on such a boundary
    backend.transform(make(planes, "uint8"), make(places, "int32"), None, wide[1:], scale=1.0)
    np.testing.assert_array_equal(backend.to_host(wide)[1:], expected(planes, places, None, (3, 3, 3, 3), 1.0))
    assert not backend.to_host(wide)[0].any()


# --- rotated, zoomed and lit ---------------------------------------------------------------------------------------------


def between(a: Any, b: Any, f: Any) -> Any:
    return np.float32(a + np.float32(f * np.float32(b - a)))


def place(warp: np.ndarray, h: int, w: int, size: int) -> tuple[int, int, Any]:
    """Two neighbours along an axis, and how near the second one is."""
    at = np.float32(np.float32(warp[0] + np.float32(warp[1] * np.float32(h))) + np.float32(warp[2] * np.float32(w)))
    at = min(max(at, np.float32(0)), np.float32(size - 1))
    return int(at), min(int(at) + 1, size - 1), np.float32(at - np.float32(int(at)))


def expected_warped(planes: np.ndarray, places: np.ndarray, warps: np.ndarray, mean: np.ndarray | None, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """One pixel at a time, each operation rounded to float32."""
    channels = shape[1]
    y = np.empty(shape, np.float32)
    for n, c, h, w in np.ndindex(*shape):
        plane = planes[places[n, 0] * channels + c].astype(np.float32)
        centred = plane if mean is None else plane - mean[c]
        i, below, fy = place(warps[n, :3], h, w, plane.shape[0])
        j, right, fx = place(warps[n, 3:6], h, w, plane.shape[1])
        value = between(between(centred[i, j], centred[i, right], fx), between(centred[below, j], centred[below, right], fx), fy)
        y[n, c, h, w] = np.float32(np.float32(value + warps[n, 6 + c]) * np.float32(scale))
    return y


def some_warps(rng: np.random.Generator, count: int, channels: int, stored: tuple[int, int]) -> np.ndarray:
    """Places within the image and far outside, on pixels and between them."""
    warps = np.concatenate([rng.normal(0, 1.2, (count, 6)), rng.normal(0, 20, (count, channels))], 1)
    warps[:, 0] += rng.uniform(0, stored[0], count)
    warps[:, 3] += rng.uniform(0, stored[1], count)
    warps[0, :6] = 0, 1, 0, 0, 0, 1
    warps[1, :6] = -1e6, 3e3, 7, 1e9, -2e8, 1e7
    return warps.astype(np.float32)


@pytest.mark.parametrize("layout", ["contract", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", ["none", "values", "image"])
@pytest.mark.parametrize(("stored", "cropped"), SIZES, ids=str)
def test_warped_against_single_pixels(
    backend: Any, make: Any, rng: np.random.Generator, stored: tuple, cropped: tuple, mean: str, dtype: str, layout: str
) -> None:
    channels, height, width = stored
    count, scale = 7, 0.0173
    shape = (count, channels, *cropped)
    planes = rng.integers(0, 256, (RECORDS * channels, height, width)).astype(np.uint8)
    places, warps = places_for(rng, count, 0, 0), some_warps(rng, count, channels, stored[1:])
    means = {"none": None, "values": rng.uniform(0, 255, (channels, 1, 1)), "image": rng.uniform(0, 255, stored)}[mean]
    means = None if means is None else means.astype(np.float32)
    y = make.empty(shape, dtype, layout)
    backend.transform(make(planes, "uint8"), make(places, "int32"), None if means is None else make(means), y, make(warps), scale=scale)
    want = expected_warped(planes, places, warps, means, shape, scale)
    want = want if dtype == "float32" else want.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(backend.to_host(y), want)


@pytest.mark.parametrize("mean", ["none", "values", "image"])
def test_a_warp_that_moves_nothing_gives_the_same_bits(backend: Any, make: Any, rng: np.random.Generator, mean: str) -> None:
    planes, places = rng.integers(0, 256, (RECORDS * 3, 7, 11)).astype(np.uint8), places_for(rng, 8, 2, 4)
    warps = np.zeros((8, 9), np.float32)
    for warp, (_, top, left, mirrored) in zip(warps, places):
        warp[:6] = (top, 1, 0, left + 6, 0, -1) if mirrored else (top, 1, 0, left, 0, 1)
    means = {"none": None, "values": rng.uniform(0, 255, (3, 1, 1)), "image": rng.uniform(0, 255, (3, 7, 11))}[mean]
    given = make(planes, "uint8"), make(places, "int32"), None if means is None else make(means)
    plain, warped = make.empty((8, 3, 5, 7)), make.empty((8, 3, 5, 7))
    backend.transform(*given, plain, scale=0.3)
    backend.transform(*given, warped, make(warps), scale=0.3)
    np.testing.assert_array_equal(backend.to_host(warped), backend.to_host(plain))
