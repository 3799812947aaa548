"""caffe.io: pictures, resizing, crops, the Transformer, and arrays in messages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import caffelite as caffe
from caffelite.errors import DataError, SnapshotError, SpecError
from caffelite.proto import caffe_pb2

# --- pictures from files -----------------------------------------------------------------------------------------------------


def test_pictures_are_red_green_blue_from_0_to_1(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (5, 7, 4), np.uint8)
    for name, part in (("rgb", pixels[:, :, :3]), ("rgba", pixels), ("grey", pixels[:, :, 0])):
        Image.fromarray(part).save(tmp_path / f"{name}.png")
    colour = pixels[:, :, :3] / 255.0
    for name, wanted in (("rgb", colour), ("rgba", colour), ("grey", colour[:, :, [0, 0, 0]])):
        loaded = caffe.io.load_image(str(tmp_path / f"{name}.png"))
        assert (loaded.dtype, loaded.shape) == (np.float32, (5, 7, 3))
        np.testing.assert_allclose(loaded, wanted, rtol=1e-6)
    luma = 0.2125 * colour[:, :, 0] + 0.7154 * colour[:, :, 1] + 0.0721 * colour[:, :, 2]
    for name, wanted in (("rgba", luma), ("grey", colour[:, :, 0])):
        loaded = caffe.io.load_image(tmp_path / f"{name}.png", color=False)
        assert (loaded.dtype, loaded.shape) == (np.float32, (5, 7, 1))
        np.testing.assert_allclose(loaded[:, :, 0], wanted, rtol=1e-6)


def test_what_is_no_picture_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.png: no such file \(expected an image\)"):
        caffe.io.load_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match=r"text\.png: not a readable image"):
        caffe.io.load_image(tmp_path / "text.png")


# --- resizing ------------------------------------------------------------------------------------------------------------------


def tents(old: int, new: int, corners: bool) -> np.ndarray:
    """What each old pixel has of each new one: bilinear weights as tents of width 2 around the new one's place."""
    places = np.array([i * (old - 1) / max(new - 1, 1) if corners else (i + 0.5) * old / new - 0.5 for i in range(new)])
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(old)))


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [(3, 4), (7, 5), (16, 3), (1, 1), (11, 23)])
def test_resizing_is_bilinear(channels: int, size: tuple[int, int], rng: np.random.Generator) -> None:
    image = rng.normal(size=(7, 5, channels))
    lowest = image.min() if channels in (1, 3) else 0
    down, across = (tents(old, new, channels not in (1, 3)) for old, new in zip((7, 5), size))
    expected = np.einsum("yh,xw,hwc->yxc", down, across, image - lowest) + lowest
    resized = caffe.io.resize_image(image, size)
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized, expected, rtol=1e-6, atol=1e-6)
    assert image.min() <= resized.min() + 1e-6
    assert resized.max() <= image.max() + 1e-6


def test_resizing_as_scikit_image_and_scipy() -> None:
    """Values of scikit-image 0.26's resize(values from 0 to 1, mode="constant", anti_aliasing=False), and of SciPy 1.17's zoom(order=1)."""
    small = np.array([[3.0, 7.0], [11.0, 5.0]])[:, :, None]
    large = [[3.0, 3.75, 5.25, 5.25], [4.5, 5.375, 6.125, 5.625], [7.5, 8.125, 6.375, 4.875], [7.5, 7.875, 5.625, 4.125]]
    np.testing.assert_allclose(caffe.io.resize_image(small, (4, 4))[:, :, 0], large, rtol=1e-6)
    nine = np.array([[0.0, 1, 2], [9, 4, 6], [3, 8, 5]])[:, :, None]
    np.testing.assert_allclose(caffe.io.resize_image(nine, (2, 2))[:, :, 0], [[2.125, 2.6875], [5.125, 5.6875]], rtol=1e-6)
    four = np.arange(24.0).reshape(2, 3, 4)
    four[1, 1] *= 2
    zoomed = [[0, 2, 4, 6, 8], [6, 12, 18, 16, 14], [12, 22, 32, 26, 20]]
    np.testing.assert_allclose(caffe.io.resize_image(four, (3, 5))[:, :, 0], zoomed, rtol=1e-6)
    row = np.arange(6.0).reshape(1, 6, 1).repeat(2, 0)
    np.testing.assert_array_equal(caffe.io.resize_image(row, (2, 3), interp_order=0)[:, :, 0], [[1, 3, 5], [1, 3, 5]])


def test_a_constant_image_stays_constant_to_its_edges() -> None:
    resized = caffe.io.resize_image(np.full((2, 3, 3), 0.25), (9, 8))
    np.testing.assert_array_equal(resized, np.full((9, 8, 3), 0.25, np.float32))


def test_what_cannot_be_resized_is_told() -> None:
    with pytest.raises(SpecError, match=r"shape \(4, 4\) is given, expected height, width, channels\n  a grey image"):
        caffe.io.resize_image(np.zeros((4, 4)), (2, 2))
    with pytest.raises(SpecError, match="cannot be resized to 0x2"):
        caffe.io.resize_image(np.zeros((4, 4, 1)), (0, 2))
    with pytest.raises(SpecError, match=r"interp_order is 3, expected 1 \(bilinear\) or 0"):
        caffe.io.resize_image(np.zeros((4, 4, 1)), (2, 2), 3)


# --- crops ---------------------------------------------------------------------------------------------------------------------


def test_ten_crops_in_their_order() -> None:
    image = np.arange(5 * 6, dtype=np.float32).reshape(5, 6, 1)
    crops = caffe.io.oversample([image, image + 100], (2, 3))
    assert (crops.shape, crops.dtype) == ((20, 2, 3, 1), np.float32)
    corners = [crop[0, 0, 0] for crop in crops[:5]]
    assert corners == [0, 3, 18, 21, 7]  # the centre begins at row 5/2 - 2/2 = 1.5 and column 6/2 - 3/2 = 1.5, both cut to 1
    np.testing.assert_array_equal(crops[4, :, :, 0], [[7, 8, 9], [13, 14, 15]])
    np.testing.assert_array_equal(crops[9, :, :, 0], [[9, 8, 7], [15, 14, 13]])
    np.testing.assert_array_equal(crops[5:10], crops[:5, :, ::-1])
    np.testing.assert_array_equal(crops[10:], crops[:10] + 100)


def test_crops_that_do_not_fit_are_told() -> None:
    with pytest.raises(SpecError, match="a crop of 6 pixels does not fit into 5"):
        caffe.io.oversample([np.zeros((5, 9, 3))], (6, 6))
    with pytest.raises(SpecError, match=r"images of shapes \(5, 9, 3\) and \(5, 8, 3\)"):
        caffe.io.oversample([np.zeros((5, 9, 3)), np.zeros((5, 8, 3))], (2, 2))
    with pytest.raises(SpecError, match="no image is given"):
        caffe.io.oversample([], (2, 2))


# --- the Transformer -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def transformer() -> caffe.io.Transformer:
    made = caffe.io.Transformer({"data": (10, 3, 4, 5)})
    made.set_transpose("data", (2, 0, 1))
    made.set_channel_swap("data", (2, 0, 1))  # which is not its own inverse
    made.set_raw_scale("data", 255)
    made.set_mean("data", np.array([10.0, 20.0, 30.0]))
    made.set_input_scale("data", 0.5)
    return made


def test_preprocess_takes_its_steps_in_order(transformer: caffe.io.Transformer, rng: np.random.Generator) -> None:
    image = rng.random((4, 5, 3))
    before = image.copy()
    blob = transformer.preprocess("data", image)
    assert (blob.dtype, blob.shape) == (np.float32, (3, 4, 5))
    for channel, (source, mean) in enumerate(((2, 10), (0, 20), (1, 30))):
        np.testing.assert_allclose(blob[channel], (image[:, :, source] * 255 - mean) * 0.5, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(image, before)
    plain = caffe.io.Transformer({"data": (1, 3, 4, 5)})
    np.testing.assert_array_equal(plain.preprocess("data", image), image.astype(np.float32))


def test_preprocess_resizes_first(transformer: caffe.io.Transformer, rng: np.random.Generator) -> None:
    image = rng.random((9, 7, 3), np.float32)
    same = transformer.preprocess("data", caffe.io.resize_image(image, (4, 5)))
    np.testing.assert_array_equal(transformer.preprocess("data", image), same)


def test_deprocess_goes_back(transformer: caffe.io.Transformer, rng: np.random.Generator) -> None:
    image = rng.random((4, 5, 3)).astype(np.float32)
    blob = transformer.preprocess("data", image)
    for item in (blob, blob[None]):
        back = transformer.deprocess("data", item)
        assert back.shape == (4, 5, 3)
        np.testing.assert_allclose(back, image, atol=1e-6)
    grey = caffe.io.Transformer({"data": (1, 1, 4, 5)})
    grey.set_transpose("data", (2, 0, 1))
    assert grey.deprocess("data", np.zeros((1, 4, 5))).shape == (4, 5, 1)


def test_means_of_other_shapes(rng: np.random.Generator) -> None:
    made = caffe.io.Transformer({"data": (1, 3, 4, 5)})
    made.set_transpose("data", (2, 0, 1))
    image, flat, whole = rng.random((4, 5, 3)), rng.random((4, 5)), rng.random((3, 8, 9))
    made.set_mean("data", flat)
    np.testing.assert_allclose(made.preprocess("data", image), image.transpose(2, 0, 1) - flat, atol=1e-6)
    made.set_mean("data", whole)
    resized = caffe.io.resize_image(whole.transpose(1, 2, 0), (4, 5)).transpose(2, 0, 1)
    np.testing.assert_allclose(made.preprocess("data", image), image.transpose(2, 0, 1) - resized, atol=1e-6)


def test_settings_that_do_not_fit_are_told(transformer: caffe.io.Transformer) -> None:
    with pytest.raises(SpecError, match=r"the transformer has no input 'dada'\n  did you mean 'data'"):
        transformer.set_raw_scale("dada", 255)
    with pytest.raises(SpecError, match=r"blob 'data': transpose is \(1, 0\), expected the numbers 0 to 2"):
        transformer.set_transpose("data", (1, 0))
    with pytest.raises(SpecError, match=r"channel_swap is \(2, 1, 3\), expected the numbers 0 to 2"):
        transformer.set_channel_swap("data", (2, 1, 3))
    with pytest.raises(SpecError, match="a mean of 4 values is given, the input has 3 channels"):
        transformer.set_mean("data", np.zeros(4))
    with pytest.raises(SpecError, match=r"a mean of shape \(2, 4, 5\) is given, expected \(channels\), \(height, width\) or \(3, 4, 5\)"):
        transformer.set_mean("data", np.zeros((2, 4, 5)))
    with pytest.raises(SpecError, match="1 channels are given, channel_swap has 3"):
        transformer.preprocess("data", np.zeros((4, 5, 1)))
    with pytest.raises(SpecError, match="takes no images"):
        caffe.io.Transformer({"x": (4, 3)}).set_transpose("x", (0,))
    untransposed = caffe.io.Transformer({"data": (1, 3, 4, 5)})
    untransposed.set_mean("data", np.zeros(3))
    with pytest.raises(SpecError, match=r"do not fit the mean's \(3, 1, 1\)\n  set_transpose"):
        untransposed.preprocess("data", np.zeros((4, 5, 3)))


# --- messages ----------------------------------------------------------------------------------------------------------------------


def test_blobs_to_arrays_and_back(rng: np.random.Generator) -> None:
    array, diff = rng.normal(size=(2, 2, 3)).astype(np.float32)
    blob = caffe.io.array_to_blobproto(array, diff)
    assert list(blob.shape.dim) == [2, 3]
    assert list(blob.data) == array.ravel().tolist()
    np.testing.assert_array_equal(caffe.io.blobproto_to_array(blob), array)
    np.testing.assert_array_equal(caffe.io.blobproto_to_array(blob, return_diff=True), diff)
    legacy = caffe_pb2.BlobProto(num=1, channels=2, height=1, width=3, data=range(6))
    np.testing.assert_array_equal(caffe.io.blobproto_to_array(legacy), np.arange(6.0).reshape(1, 2, 1, 3))
    with pytest.raises(SnapshotError, match="needs 6 data values, found 5"):
        caffe.io.blobproto_to_array(caffe_pb2.BlobProto(shape=blob.shape, data=range(5)))


def test_lists_of_arrays_to_bytes_and_back(rng: np.random.Generator) -> None:
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in ((2, 3), (4,), (1, 1, 2, 2))]
    data = caffe.io.arraylist_to_blobprotovector_str(arrays)
    assert [list(blob.shape.dim) for blob in caffe_pb2.BlobProtoVector.FromString(data).blobs] == [[2, 3], [4], [1, 1, 2, 2]]
    for found, array in zip(caffe.io.blobprotovector_str_to_arraylist(data), arrays, strict=True):
        np.testing.assert_array_equal(found, array)
    with pytest.raises(SnapshotError, match="3 bytes are not a BlobProtoVector"):
        caffe.io.blobprotovector_str_to_arraylist(b"\x0a\xff\x01")


def test_records(rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (3, 2, 4), np.uint8)
    datum = caffe.io.array_to_datum(pixels, 7)
    assert (datum.channels, datum.height, datum.width, datum.label) == (3, 2, 4, 7)
    assert datum.data == pixels.tobytes()
    assert not datum.float_data
    back = caffe.io.datum_to_array(datum)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, pixels)
    floats = caffe.io.array_to_datum(pixels / 4)
    assert (list(floats.float_data), floats.data, floats.HasField("label")) == ((pixels / 4).ravel().tolist(), b"", False)
    np.testing.assert_array_equal(caffe.io.datum_to_array(floats), pixels / 4)
    with pytest.raises(DataError, match=r"shape \(2, 4\) is given, expected channels, height, width"):
        caffe.io.array_to_datum(pixels[0])
    datum.width = 5
    with pytest.raises(DataError, match="a record says 3x2x5 but holds 24 values"):
        caffe.io.datum_to_array(datum)


def test_an_encoded_record_is_decoded(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (4, 3, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    datum = caffe_pb2.Datum(data=(tmp_path / "x.png").read_bytes(), encoded=True)
    np.testing.assert_array_equal(caffe.io.datum_to_array(datum), pixels.transpose(2, 0, 1)[::-1])
