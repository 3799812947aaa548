"""Datum records: raw, encoded and float ones, and every bad one as an error."""

from __future__ import annotations

import io

import numpy as np
import pytest
from data_samples import Pixels, photo, raw
from PIL import Image

from caffelite.data.datum import DatumDecoder
from caffelite.data.images import decode_image
from caffelite.errors import DataError
from caffelite.schema import pb


def decode(value: bytes, channels: int | None = None) -> tuple[Pixels, int]:
    return DatumDecoder(channels)(memoryview(value))


def encoded(pixels: Pixels, kind: str = "PNG", mode: str | None = None) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, kind)
    return file.getvalue()


def test_raw_records_of_changing_sizes_and_labels(rng: np.random.Generator) -> None:
    decoder = DatumDecoder()
    for i in range(60):
        shape = [(3, 4, 5), (3, 5, 4), (1, 7, 200)][i // 7 % 3]
        pixels = rng.integers(0, 256, shape, np.uint8)
        label = [0, 1, 127, 128, 300, -1, 2**24][i % 7]
        found = decoder(memoryview(raw(pixels, label)))
        assert found.pixels.dtype == np.uint8
        np.testing.assert_array_equal(found.pixels, pixels)
        assert found.label == label


def test_fields_in_any_order_and_absent_ones(rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (2, 3, 4), np.uint8)
    one = pb.Datum(label=9, data=pixels.tobytes()).SerializeToString()
    two = pb.Datum(channels=2, height=3, width=4).SerializeToString()
    decoder = DatumDecoder()
    for value, label in (
        (one + two, 9),
        (raw(pixels, 3), 3),
        (two + one, 9),
        (raw(pixels, 4), 4),
        (pb.Datum.FromString(two + one[:-2]).SerializeToString(), 0),
    ):
        found = decoder(memoryview(value))
        np.testing.assert_array_equal(found.pixels, pixels)
        assert found.label == label


def test_a_later_field_overrides_the_fast_path(rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (1, 4, 4), np.uint8)
    decoder = DatumDecoder()
    decoder(memoryview(raw(pixels, 1)))
    replaced = raw(pixels, 1) + pb.Datum(data=bytes(16), label=2).SerializeToString()
    for _ in range(2):
        found = decoder(memoryview(replaced))
        assert found.label == 2
        assert not found.pixels.any()


def test_float_data() -> None:
    datum = pb.Datum(channels=1, height=2, width=2, float_data=[0.5, -1, 2, 3], label=1)
    pixels, label = decode(datum.SerializeToString())
    assert label == 1
    np.testing.assert_array_equal(pixels, np.array([[[0.5, -1], [2, 3]]], np.float32))


def test_encoded_colour_is_blue_first_and_converts_on_demand() -> None:
    picture = photo()
    value = pb.Datum(data=encoded(picture), label=5, encoded=True).SerializeToString()
    pixels, label = decode(value)
    assert label == 5
    np.testing.assert_array_equal(pixels, picture[:, :, ::-1].transpose(2, 0, 1))
    gray, _ = decode(value, 1)
    luma = picture.astype(float) @ [0.299, 0.587, 0.114]  # ITU-R BT.601, as in Pillow and OpenCV
    assert gray.shape == (1, 20, 24)
    assert np.abs(gray[0] - luma).max() <= 1


def test_encoded_gray_stays_one_channel_unless_colour_is_forced() -> None:
    picture = photo(channels=1)
    value = pb.Datum(data=encoded(picture), encoded=True).SerializeToString()
    np.testing.assert_array_equal(decode(value)[0], picture[None])
    np.testing.assert_array_equal(decode(value, 3)[0], np.stack([picture] * 3))


@pytest.mark.parametrize(("mode", "channels"), [("P", 3), ("1", 1), ("RGBA", 4), ("LA", 4), ("CMYK", 3)])
def test_other_kinds_of_images(mode: str, channels: int) -> None:
    assert decode_image(encoded(photo(), "TIFF" if mode == "CMYK" else "PNG", mode)).shape == (channels, 20, 24)


def test_sixteen_bits_are_refused() -> None:
    with pytest.raises(DataError, match="expected 8 bits"):
        decode_image(encoded(photo(channels=1).astype(np.uint16)))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"garbage", "is not a Datum"),
        (raw(np.zeros((3, 4, 5), np.uint8), 1)[:-10], "is not a Datum"),
        (pb.Datum(channels=3, height=4, width=5, data=bytes(59)).SerializeToString(), "says 3x4x5 but holds 59 values"),
        (pb.Datum(channels=3, height=4, width=5).SerializeToString(), "says 3x4x5 but holds 0 values"),
        (pb.Datum(label=1).SerializeToString(), "its size is 0x0x0"),
        (b"", "its size is 0x0x0"),
        (pb.Datum(channels=-1, height=4, width=5, data=bytes(20)).SerializeToString(), "its size is -1x4x5"),
        (raw(np.zeros((1, 2, 2), np.uint8), 2**24 + 1), "label 16777217 is outside"),
        (pb.Datum(data=b"no image", encoded=True).SerializeToString(), "not a readable image: of no format that Pillow knows"),
        (pb.Datum(data=b"", encoded=True).SerializeToString(), "not a readable image: it is empty"),
        (pb.Datum(data=encoded(photo(200, 200), "JPEG")[:-600], encoded=True).SerializeToString(), "not a readable image"),
    ],
)
def test_bad_records(value: bytes, text: str) -> None:
    with pytest.raises(DataError, match=text):
        decode(value)


def test_a_truncated_record_after_good_ones_is_found() -> None:
    good = raw(np.zeros((3, 40, 40), np.uint8), 1)
    decoder = DatumDecoder()
    decoder(memoryview(good))
    with pytest.raises(DataError, match="is not a Datum"):
        decoder(memoryview(good[:-30]))


def test_force_color_cannot_change_raw_planes() -> None:
    value = raw(np.zeros((1, 2, 2), np.uint8))
    decode(value, 1)
    with pytest.raises(DataError, match="raw pixels of 1 channel"):
        decode(value, 3)
