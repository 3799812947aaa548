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
@pytest.mark.parametrize(
    ("stored", "cropped"), [((3, 7, 11), (5, 7)), ((3, 8, 8), (8, 8)), ((1, 5, 9), (5, 3)), ((4, 6, 5), (3, 4)), ((2, 1, 1), (1, 1))], ids=str
)
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
