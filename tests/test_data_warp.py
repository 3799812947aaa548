"""Rotation, zoom and lighting: what is drawn, and images against a formula in float64 that turns every pixel by itself."""

from __future__ import annotations

from math import cos, floor, radians, sin
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_harness import said
from data_samples import batches, fail, numbered, raw, source_of, write_lmdb
from PIL import Image

from caffelite.data.transformer import Transformer
from caffelite.data.warp import Sampler, Warp, placing, shifts
from caffelite.errors import SpecError
from caffelite.schema import array_to_blob, message_bytes, pb

SHAPE = (3, 13, 17)
EIGENVALUES = np.array([55.4625, 4.794, 1.1475])
EIGENVECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])  # red, green, blue


def transformer(training: bool = True, **fields: Any) -> Transformer:
    return Transformer(pb.TransformationParameter(**fields), training, fail)


def pixel(plane: np.ndarray, y: float, x: float) -> float:
    """Bilinear in float64; beyond the edges the nearest pixel."""
    total = 0.0
    for row in (floor(y), floor(y) + 1):
        for column in (floor(x), floor(x) + 1):
            inside = plane[min(max(row, 0), plane.shape[0] - 1), min(max(column, 0), plane.shape[1] - 1)]
            total += (1 - abs(y - row)) * (1 - abs(x - column)) * float(inside)
    return total


def turned(image: np.ndarray, angle: float, zoom: float, place: tuple[int, int, int], size: tuple[int, int]) -> np.ndarray:
    """Walks over the result: back from the mirror, to the crop's centre, smaller by the zoom, clockwise by the angle."""
    out = np.empty((len(image), *size))
    middle, centre = place[0] + (size[0] - 1) / 2, place[1] + (size[1] - 1) / 2
    for c, h, w in np.ndindex(*out.shape):
        right = place[1] + (size[1] - 1 - w if place[2] else w) - centre
        up = middle - (place[0] + h)
        source_right = (right * cos(radians(angle)) + up * sin(radians(angle))) / zoom
        source_up = (up * cos(radians(angle)) - right * sin(radians(angle))) / zoom
        out[c, h, w] = pixel(image[c], middle - source_up, centre + source_right)
    return out


def sampled(image: np.ndarray, angle: float, zoom: float, place: tuple[int, int, int], size: tuple[int, int], mean: Any = None) -> np.ndarray:
    out = np.full((*size, len(image)), np.nan, np.float32)
    row = placing(np.array([angle]), np.array([zoom]), np.array([place], np.int32), size)[0].astype(np.float32)
    Sampler(len(image), *size).sample(image, mean, row, out)
    return out.transpose(2, 0, 1)


@pytest.mark.parametrize("place", [(2, 4, 0), (0, 7, 1)])
@pytest.mark.parametrize(("angle", "zoom"), [(0, 1), (17, 1), (-63.5, 1), (0, 1.7), (0, 0.4), (30, 0.8), (-170, 3)])
def test_against_float64(rng: np.random.Generator, angle: float, zoom: float, place: tuple[int, int, int]) -> None:
    image = rng.integers(0, 256, SHAPE).astype(np.uint8)
    for size in ((9, 7), (10, 8)):
        np.testing.assert_allclose(sampled(image, angle, zoom, place, size), turned(image, angle, zoom, place, size), atol=1e-3)


@pytest.mark.parametrize("side", [5, 6])
@pytest.mark.parametrize("quarters", [-2, -1, 1, 2])
def test_quarter_turns_take_pixels_as_they_are(rng: np.random.Generator, side: int, quarters: int) -> None:
    image = rng.integers(0, 256, (3, side, side)).astype(np.uint8)
    want = np.rot90(image, quarters, axes=(1, 2))
    np.testing.assert_array_equal(sampled(image, 90 * quarters, 1, (0, 0, 0), (side, side)), want)
    np.testing.assert_array_equal(sampled(image, 90 * quarters, 1, (0, 0, 1), (side, side)), want[:, :, ::-1])


def test_positive_angles_turn_anticlockwise_as_pillow_does() -> None:
    image = np.zeros((1, 9, 9), np.uint8)
    image[0, 4, 4:] = 200  # a hand that points to the right
    assert sampled(image, 90, 1, (0, 0, 0), (9, 9))[0, :5, 4].tolist() == [200] * 5
    smooth = np.add.outer(np.arange(31) * 3, np.arange(31) * 2).astype(np.uint8)
    pillow = np.asarray(Image.fromarray(smooth).rotate(20, Image.Resampling.BILINEAR), np.float32)
    np.testing.assert_allclose(sampled(smooth[None], 20, 1, (0, 0, 0), (31, 31))[0, 8:23, 8:23], pillow[8:23, 8:23], atol=1)  # Pillow rounds


def test_zoom_doubles_an_image_about_its_centre() -> None:
    image = np.arange(25, dtype=np.float32).reshape(1, 5, 5)
    want = np.add.outer(np.arange(1, 3.5, 0.5) * 5, np.arange(1, 3.5, 0.5))
    np.testing.assert_array_equal(sampled(image, 0, 2, (0, 0, 0), (5, 5))[0], want)


def test_edges_go_on() -> None:
    image = np.array([[[10, 20, 30]] * 3], np.float32)
    np.testing.assert_array_equal(sampled(image, 0, 0.01, (0, 0, 0), (3, 3))[0], [[10, 20, 30]] * 3)
    np.testing.assert_array_equal(sampled(image + 5, 0, 0.5, (0, 0, 0), (3, 3), image)[0], np.full((3, 3), 5))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("mean", ["none", "values", "file"])
@pytest.mark.parametrize("crop", [0, 9])
def test_settings_together(rng: np.random.Generator, tmp_path: Path, crop: int, mean: str, dtype: Any) -> None:
    """Pixels less the mean are turned; lighting is added; the scale comes last."""
    fields: dict[str, Any] = {"crop_size": crop, "mirror": True, "scale": 0.25, "rotation": 50, "min_zoom": 0.8, "max_zoom": 1.6, "lighting": 0.5}
    means = np.zeros(SHAPE)
    if mean == "values":
        fields["mean_value"], means = [104, 117, 123], np.broadcast_to(np.array([104, 117, 123])[:, None, None], SHAPE)
    elif mean == "file":
        means = rng.uniform(0, 255, SHAPE).astype(np.float32)
        blob = pb.BlobProto()
        array_to_blob(means, blob)
        (tmp_path / "mean").write_bytes(message_bytes(blob))
        fields["mean_file"] = str(tmp_path / "mean")
    subject = transformer(**fields)
    shape = subject.output_shape(SHAPE)
    items = [rng.integers(0, 256, SHAPE).astype(dtype) for _ in range(6)]
    words, warp_words = rng.integers(0, 2**64, 6, np.uint64), rng.integers(0, 2**64, (6, 4), np.uint64)
    out = np.empty((6, shape[1], shape[2], 3), np.float32)
    subject.apply(items, words, out, warp_words)
    places = subject.places(words, SHAPE[1] - shape[1], SHAPE[2] - shape[2])
    for item, place, draws, found in zip(items, places.tolist(), warp_words.tolist(), out):
        u = [part / 2**32 for word in draws for part in divmod(word, 2**32)]
        factors = 0.5 * np.concatenate(
            [np.sqrt(-2 * np.log(1 - u[i])) * np.array([np.cos(2 * np.pi * u[i + 1]), np.sin(2 * np.pi * u[i + 1])]) for i in (2, 4)]
        )
        light = (EIGENVECTORS @ (EIGENVALUES * factors[:3]))[::-1]
        want = turned(item - means, 50 * (2 * u[0] - 1), 0.8 + 0.8 * u[1], place, shape[1:]) + light[:, None, None]
        np.testing.assert_allclose(found.transpose(2, 0, 1), want * 0.25, atol=1e-3)


def test_draws_are_spread_as_documented() -> None:
    warp = Warp(pb.TransformationParameter(rotation=30, min_zoom=0.5, max_zoom=2, lighting=0.1), True, fail)
    count = 4000
    rows = warp.rows(np.random.Philox(3).random_raw(4 * count).reshape(count, 4), np.zeros((count, 3), np.int32), (3, 1, 1)).astype(float)
    angles, zooms = np.degrees(np.arctan2(rows[:, 2], rows[:, 1])), 1 / np.hypot(rows[:, 1], rows[:, 2])
    for values, least, most in ((angles, -30, 30), (zooms, 0.5, 2)):
        counts, _ = np.histogram(values, 10, (least, most))
        assert counts.sum() == count  # none beyond
        assert np.abs(counts - 400).max() < 5 * np.sqrt(400 * 0.9)
    assert abs(np.corrcoef(angles, zooms)[0, 1]) < 5 / np.sqrt(count)
    factors = rows[:, :5:-1] @ EIGENVECTORS / EIGENVALUES / 0.1  # the eigenvectors are orthonormal
    np.testing.assert_allclose(np.cov(factors.T), np.eye(3), atol=5 * np.sqrt(2 / count))
    np.testing.assert_allclose(factors.mean(0), 0, atol=5 / np.sqrt(count))


def test_components_are_orthonormal_and_red_is_last() -> None:
    np.testing.assert_allclose(EIGENVECTORS.T @ EIGENVECTORS, np.eye(3), atol=1e-3)
    for i in range(3):
        np.testing.assert_allclose(shifts(np.eye(3))[i, ::-1], EIGENVECTORS[:, i] * EIGENVALUES[i], rtol=1e-12)


SETTINGS: list[dict[str, Any]] = [{"rotation": 30, "lighting": 0.1}, {"lighting": 0.1}, {"min_zoom": 0.8}]


@pytest.mark.parametrize("fields", SETTINGS, ids=str)
def test_tests_are_left_alone_and_nothing_asked_for_changes_nothing(tmp_path: Path, fields: dict[str, Any]) -> None:
    path, _ = numbered(tmp_path / "db", 6)
    plain = {"crop_size": 6, "mirror": True}
    for phase, extra in ((pb.TEST, fields), (pb.TRAIN, {"rotation": 0, "min_zoom": 1, "max_zoom": 1, "lighting": 0})):
        want, _ = batches(source_of(path, phase=phase, transform=plain), 3)
        got, _ = batches(source_of(path, phase=phase, transform=plain | extra), 3)
        np.testing.assert_array_equal(got, want)
    changed, _ = batches(source_of(path, transform=plain | fields), 3)
    assert np.abs(changed - batches(source_of(path, transform=plain), 3)[0]).max() > 0


@pytest.mark.parametrize("fields", SETTINGS, ids=str)
def test_an_image_is_a_function_of_seed_and_position(tmp_path: Path, fields: dict[str, Any]) -> None:
    path, _ = numbered(tmp_path / "db", 7)
    options = {"transform": {"crop_size": 6, "mirror": True, **fields}, "shuffle": True}
    whole, _ = batches(source_of(path, **options), 7)
    for batch, position in ((4, 12), (3, 5), (1, 27)):
        subject = source_of(path, batch, **options)
        subject.seek(position)
        np.testing.assert_array_equal(batches(subject, 1)[0], whole[position : position + batch])
        subject.close()
    assert not np.array_equal(batches(source_of(path, seed=4, **options), 7)[0], whole)


def test_float_images_of_differing_sizes(rng: np.random.Generator) -> None:
    items = [rng.normal(0, 1, (1, *size)).astype(np.float32) for size in ((8, 8), (12, 9), (6, 20))]
    subject = transformer(crop_size=6, rotation=180)
    subject.output_shape((1, 8, 8))
    words, warp_words = np.zeros(3, np.uint64), np.full((3, 4), 0xFFFFFFFFFFFFFFFF, np.uint64)
    out = np.empty((3, 6, 6, 1), np.float32)
    subject.apply(items, words, out, warp_words)
    for item, found in zip(items, out):  # turned by all but 180 degrees
        np.testing.assert_allclose(found[:, :, 0], item[0, 5::-1, 5::-1], atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "shape", "place", "text"),
    [
        ({"rotation": -1}, SHAPE, "rotation", "rotation is -1, expected 0 to 180 degrees"),
        ({"rotation": 181}, SHAPE, "rotation", "rotation is 181, expected 0 to 180 degrees"),
        ({"rotation": float("nan")}, SHAPE, "rotation", "rotation is nan, expected"),
        ({"min_zoom": 0}, SHAPE, "min_zoom", "min_zoom is 0, expected 0.01 to 100"),
        ({"max_zoom": float("inf")}, SHAPE, "max_zoom", "max_zoom is inf, expected 0.01 to 100"),
        ({"min_zoom": 2}, SHAPE, "min_zoom", "min_zoom is 2 and max_zoom 1: no factor lies between"),
        ({"max_zoom": 0.5}, SHAPE, "max_zoom", "min_zoom is 1 and max_zoom 0.5: no factor lies between"),
        ({"lighting": -0.1}, SHAPE, "lighting", "lighting is -0.1, expected 0 to 100"),
        ({"lighting": float("inf")}, SHAPE, "lighting", "lighting is inf, expected 0 to 100"),
        ({"lighting": 0.1}, (1, 8, 8), "lighting", "it needs images of 3 channels, these have 1"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_settings_without_a_meaning(fields: dict[str, Any], shape: tuple[int, int, int], place: str, text: str, training: bool) -> None:
    with pytest.raises(SpecError, match=text) as caught:
        transformer(training, **fields).output_shape(shape)
    assert str(caught.value).startswith(f"transform_param.{place}")


@pytest.mark.parametrize("fields", [{"rotation": 180}, {"min_zoom": 0.01}, {"max_zoom": 100}, {"min_zoom": 2, "max_zoom": 2}, {"lighting": 100}], ids=str)
def test_the_ends_of_what_is_allowed(rng: np.random.Generator, fields: dict[str, Any]) -> None:
    subject = transformer(**fields)
    shape = subject.output_shape(SHAPE)
    out = np.full((50, *shape[1:], 3), np.nan, np.float32)
    subject.apply([np.zeros(SHAPE, np.uint8)] * 50, np.zeros(50, np.uint64), out, rng.integers(0, 2**64, (50, 4), np.uint64))
    assert np.isfinite(out).all()


def test_check_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write_lmdb(tmp_path / "db", [raw(np.zeros((1, 8, 8), np.uint8))])
    net = 'layer { name: "d" type: "Data" top: "x" data_param { source: "db" backend: LMDB batch_size: 1 }\n  transform_param { scale: 1 FIELD } }\n'
    colours = "it needs images of 3 channels, these have 1\n  remove lighting, or "
    for field, text in (
        ("rotation: -3", "rotation is -3, expected 0 to 180 degrees"),
        ("lighting: 0.1", colours + "set force_color: true for encoded images\n"),
        ("lighting: 0.1 force_gray: true", colours + "force_gray\n"),
    ):
        Path("net.prototxt").write_text(net.replace("FIELD", field))
        err = said(capsys, "check", "net.prototxt", status=2)[1]
        assert err.startswith("caffelite: error: net.prototxt:2:30: layer 'd': ")
        assert text in err
