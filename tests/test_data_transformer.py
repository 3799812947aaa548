"""The transformer against a loop over single pixels in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import fail

from caffelite.data.transformer import ItemError, Transformer
from caffelite.errors import DataError, SpecError
from caffelite.schema import array_to_blob, message_bytes, pb

Floats = np.ndarray[Any, np.dtype[np.float32]]
SHAPE = (3, 9, 11)


def transformer(training: bool = True, **fields: Any) -> Transformer:
    return Transformer(pb.TransformationParameter(**fields), training, fail)


def write_mean(path: Path, mean: Floats, legacy: bool = True) -> str:
    blob = pb.BlobProto()
    array_to_blob(mean[None] if legacy else mean, blob)
    if legacy:
        blob.ClearField("shape")
        blob.num, (blob.channels, blob.height, blob.width) = 1, mean.shape
    path.write_bytes(message_bytes(blob))
    return str(path)


def expected(item: Any, word: int, crop: int, mirror: bool, training: bool, mean: Any, scale: float) -> Floats:
    """Caffe's rule, one pixel at a time."""
    channels, height, width = item.shape
    rows, columns = (crop, crop) if crop else (height, width)
    top, left = (height - rows) // 2, (width - columns) // 2
    if training and crop:
        top = ((word >> 31) % 2**31) % (height - crop + 1)
        left = (word % 2**31) % (width - crop + 1)
    out = np.zeros((channels, rows, columns), np.float32)
    for c in range(channels):
        for h in range(rows):
            for w in range(columns):
                target = columns - 1 - w if mirror and word >= 2**63 else w
                subtracted = 0.0 if mean is None else mean[c, h + top, w + left] if np.ndim(mean) == 3 else mean[c]
                out[c, h, target] = (float(item[c, h + top, w + left]) - subtracted) * scale
    return out


@pytest.mark.parametrize("crop", [0, 6, 9])
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["none", "one", "values", "file", "file_shape"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_every_setting_against_single_pixels(rng: np.random.Generator, tmp_path: Path, crop: int, mirror: bool, training: bool, kind: str, dtype: Any) -> None:
    fields: dict[str, Any] = {"crop_size": crop, "mirror": mirror, "scale": 0.25}
    mean: Any = None
    if kind == "one":
        fields["mean_value"], mean = [100.5], np.full(3, 100.5)
    elif kind == "values":
        fields["mean_value"], mean = [104, 117, 123], np.array([104, 117, 123])
    elif kind.startswith("file"):
        mean = rng.uniform(0, 255, SHAPE).astype(np.float32)
        fields["mean_file"] = write_mean(tmp_path / "mean.binaryproto", mean, legacy=kind == "file")
    subject = transformer(training, **fields)
    out_shape = subject.output_shape(SHAPE)
    assert out_shape == (3, crop or 9, crop or 11)
    items = [rng.integers(0, 256, SHAPE).astype(dtype) for _ in range(12)]
    words = rng.integers(0, 2**64, 12, np.uint64)
    out = np.full((12, out_shape[1], out_shape[2], 3), np.nan, np.float32)
    subject.apply(items, words, out)
    for item, word, found in zip(items, words.tolist(), out):
        want = expected(item, word, crop, mirror, training, mean, 0.25)
        np.testing.assert_allclose(found.transpose(2, 0, 1), want, rtol=1e-6, atol=1e-5)


def test_draws_cover_all_places_and_both_sides() -> None:
    item = np.arange(20 * 20, dtype=np.float32).reshape(1, 20, 20)
    subject = transformer(crop_size=18, mirror=True)
    subject.output_shape(item.shape)
    words = np.random.Philox(1).random_raw(2000)
    out = np.zeros((2000, 18, 18, 1), np.float32)
    subject.apply([item] * 2000, words, out)
    corners, counts = np.unique(out[:, 0, [0, -1], 0], axis=0, return_counts=True)
    assert len(corners) == 3 * 3 * 2
    assert counts.min() > 70  # 111 expected


def test_items_of_differing_sizes_are_cropped_alike(rng: np.random.Generator) -> None:
    items = [rng.integers(0, 256, (1, h, w), np.uint8) for h, w in ((8, 8), (12, 9))]
    subject = transformer(training=False, crop_size=6)
    subject.output_shape((1, 8, 8))
    out = np.zeros((2, 6, 6, 1), np.float32)
    subject.apply(items, np.zeros(2, np.uint64), out)
    np.testing.assert_array_equal(out[0, :, :, 0], items[0][0, 1:7, 1:7])
    np.testing.assert_array_equal(out[1, :, :, 0], items[1][0, 3:9, 1:7])


@pytest.mark.parametrize(
    ("fields", "place", "text"),
    [
        ({"force_color": True, "force_gray": True}, "transform_param.force_gray", "exclude each other"),
        ({"mean_file": "x", "mean_value": [1]}, "transform_param.mean_value", "exclude each other"),
        ({"crop_size": 10}, "transform_param.crop_size", "crop_size is 10, but the images are 9x11"),
        ({"mean_value": [1, 2]}, "transform_param.mean_value", "2 mean_value, but the images have 3 channel"),
    ],
)
def test_bad_settings(fields: dict[str, Any], place: str, text: str) -> None:
    with pytest.raises(SpecError, match=text) as caught:
        transformer(**fields).output_shape(SHAPE)
    assert str(caught.value).startswith(place)


def test_a_mean_that_is_not_there() -> None:
    with pytest.raises(DataError, match=r"^transform_param.mean_file: mean_file cannot be used: /nowhere/mean.binaryproto: no such file"):
        transformer(mean_file="/nowhere/mean.binaryproto").output_shape(SHAPE)


def test_mean_of_another_size(tmp_path: Path) -> None:
    name = write_mean(tmp_path / "mean.binaryproto", np.zeros((3, 6, 6), np.float32))
    with pytest.raises(SpecError, match="is 3x6x6, but the images are 3x9x11") as caught:
        transformer(mean_file=name, crop_size=6).output_shape(SHAPE)
    assert "caffelite mean" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "shape", "text"),
    [
        ({}, (3, 9, 12), "it is 9x12, the first record is 9x11"),
        ({}, (1, 9, 11), "it has 1 channel.*, the first record has 3"),
        ({"crop_size": 6}, (3, 5, 30), "it is 5x30, smaller than crop_size 6"),
    ],
)
def test_items_that_do_not_fit(fields: dict[str, Any], shape: tuple[int, int, int], text: str) -> None:
    subject = transformer(**fields)
    _, height, width = subject.output_shape(SHAPE)
    items = [np.zeros(SHAPE, np.uint8), np.zeros(shape, np.uint8)]
    with pytest.raises(ItemError, match=text) as caught:
        subject.apply(items, np.zeros(2, np.uint64), np.zeros((2, height, width, 3), np.float32))
    assert caught.value.index == 1


def test_item_of_another_size_than_the_mean(tmp_path: Path) -> None:
    subject = transformer(crop_size=6, mean_file=write_mean(tmp_path / "m", np.zeros(SHAPE, np.float32)))
    subject.output_shape(SHAPE)
    with pytest.raises(ItemError, match="it is 10x11, the mean image is 9x11"):
        subject.apply([np.zeros((3, 10, 11), np.uint8)], np.zeros(1, np.uint64), np.zeros((1, 6, 6, 3), np.float32))
