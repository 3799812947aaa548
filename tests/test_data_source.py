"""BatchSource: batches, positions, exact continuation, and bad databases."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from data_samples import batches, fail, numbered, photo, raw, source_of, write_lmdb

from caffelite.data.images import encode_image
from caffelite.data.source import BatchSource
from caffelite.errors import DataError, SpecError
from caffelite.schema import pb

RANDOM = {"crop_size": 6, "mirror": True, "mean_value": [10.0]}


def test_key_order_wraps_around(tmp_path: Path) -> None:
    path, images = numbered(tmp_path / "db", 6)
    source = source_of(path)
    data, labels = batches(source, 4)
    assert labels.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    np.testing.assert_array_equal(data[:6], images)
    assert (source.position, source.count, source.item_shape) == (16, 6, (3, 8, 10))
    source.close()


def test_a_database_smaller_than_the_batch(tmp_path: Path) -> None:
    path, _ = numbered(tmp_path / "db", 3)
    source = source_of(path, 8)
    assert batches(source, 1)[1].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    source.close()


def test_shuffling_covers_every_record_once_an_epoch(tmp_path: Path) -> None:
    path, images = numbered(tmp_path / "db", 12)
    source = source_of(path, shuffle=True)
    data, labels = batches(source, 6)
    first, second = labels[:12].tolist(), labels[12:].tolist()
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert first != sorted(first)
    np.testing.assert_array_equal(data, images[labels.astype(int)])
    source.close()


@pytest.mark.parametrize("shuffle", [False, True])
def test_seek_goes_on_exactly_as_an_uninterrupted_run(tmp_path: Path, shuffle: bool) -> None:
    path, _ = numbered(tmp_path / "db", 10)
    whole = source_of(path, transform=RANDOM, shuffle=shuffle)
    data, labels = batches(whole, 12)
    whole.close()
    if not shuffle:
        assert np.ptp(data[[0, 20, 40]], axis=0).any()  # record 0 in the same place of three batches: other crops or sides
    for position in (0, 4, 12, 36):
        resumed = source_of(path, transform=RANDOM, shuffle=shuffle, prefetch=1)
        resumed.seek(position)
        assert resumed.position == position
        again, names = batches(resumed, 3)
        np.testing.assert_array_equal(again, data[position : position + 12])
        np.testing.assert_array_equal(names, labels[position : position + 12])
        resumed.seek(position)  # back, with batches read ahead
        np.testing.assert_array_equal(batches(resumed, 1)[0], data[position : position + 4])
        resumed.close()


def test_another_seed_gives_other_crops_and_a_late_seed_counts(tmp_path: Path) -> None:
    path, _ = numbered(tmp_path / "db", 10)
    results = []
    for seed in (3, 4):
        source = source_of(path, transform=RANDOM, seed=seed)
        results.append(batches(source, 5)[0])
        source.close()
    assert np.abs(results[0] - results[1]).max() > 0
    source = source_of(path, transform=RANDOM, seed=3)
    batches(source, 1)
    source.seed = 4
    np.testing.assert_array_equal(batches(source, 4)[0], results[1][4:])
    source.close()


def test_test_phase_crops_the_centre(tmp_path: Path) -> None:
    path, images = numbered(tmp_path / "db", 4)
    source = source_of(path, phase=pb.TEST, transform={"crop_size": 6})
    np.testing.assert_array_equal(batches(source, 1)[0], images[:, :, 1:7, 2:8])
    source.close()


def test_bfloat16_is_the_rounded_float32(tmp_path: Path) -> None:
    path, images = numbered(tmp_path / "db", 4)
    source = source_of(path, transform={"scale": 0.3})
    source.start(4, "bfloat16")
    data = np.zeros((4, 8, 10, 3), ml_dtypes.bfloat16).transpose(0, 3, 1, 2)
    source.next(data)
    np.testing.assert_array_equal(data, (images.astype(np.float32) * np.float32(0.3)).astype(ml_dtypes.bfloat16))
    source.close()


def test_encoded_records(tmp_path: Path) -> None:
    pictures = [photo(seed=i) for i in range(3)]
    planes = [picture[:, :, ::-1].transpose(2, 0, 1) for picture in pictures]
    path = write_lmdb(tmp_path / "db", [pb.Datum(data=encode_image(p, "png"), label=i, encoded=True).SerializeToString() for i, p in enumerate(planes)])
    source = source_of(path, 3)
    data, labels = batches(source, 1)
    np.testing.assert_array_equal(data, planes)
    assert labels.tolist() == [0, 1, 2]
    source.close()


def test_two_sources_of_one_database(tmp_path: Path) -> None:
    path, _ = numbered(tmp_path / "db", 8)
    first, second = source_of(path), source_of(path, phase=pb.TEST)
    assert batches(first, 1)[1].tolist() == batches(second, 1)[1].tolist()
    first.close()
    assert batches(second, 1)[1].tolist() == [4, 5, 6, 7]
    second.close()


def test_close_ends_the_thread_and_reading_can_go_on(tmp_path: Path) -> None:
    path, _ = numbered(tmp_path / "db", 8)
    source = source_of(path)
    batches(source, 1)
    source.close()
    assert not [thread for thread in threading.enumerate() if thread.name == f"data {path}"]
    assert batches(source, 1)[1].tolist() == [4, 5, 6, 7]
    source.close()


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (b"garbage", "is not a Datum"),
        (raw(np.zeros((3, 8, 9), np.uint8)), "it is 8x9, the first record is 8x10"),
        (raw(np.zeros((3, 8, 10), np.uint8), 2**30), "label 1073741824 is outside"),
    ],
)
def test_a_bad_record_names_database_and_key_and_keeps_the_batches_before(tmp_path: Path, bad: bytes, text: str) -> None:
    good = raw(np.zeros((3, 8, 10), np.uint8), 1)
    path = write_lmdb(tmp_path / "db", [*[good] * 9, bad, good])
    source = source_of(path)
    batches(source, 2)
    for _ in range(2):
        with pytest.raises(DataError, match=text) as caught:
            batches(source, 1)
        assert str(caught.value).startswith(f"{path}: record '00000009': ")
        assert source.position == 8
    source.close()


def test_a_bad_first_record_is_found_when_shapes_are_asked_for(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "db", [b"garbage"])
    with pytest.raises(DataError, match=r"record '00000000': .* is not a Datum"):
        _ = source_of(path).item_shape


def test_an_empty_database(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "db", [])
    source = source_of(path)
    for _ in range(2):
        with pytest.raises(DataError, match="holds no records"):
            _ = source.item_shape


@pytest.mark.parametrize(
    ("fields", "place", "text"),
    [
        ({"source": ""}, "source", "needs a source"),
        ({"batch_size": 0}, "batch_size", "batch_size of at least 1"),
        ({"prefetch": 0}, "prefetch", "prefetch is 0, expected 1 to 1000 batches"),
        ({"prefetch": 4294967295}, "prefetch", "expected 1 to 1000 batches"),
        ({"rand_skip": 5}, "rand_skip", "shuffle: true"),
        ({"force_encoded_color": True}, "force_encoded_color", "force_color"),
    ],
)
def test_fields_that_cannot_work_are_refused_with_their_place(fields: dict[str, Any], place: str, text: str) -> None:
    param = pb.DataParameter(**{"source": "x", "batch_size": 1, **fields})
    with pytest.raises(SpecError) as caught:
        BatchSource(param, pb.TransformationParameter(), pb.TRAIN, 0, 0, fail)
    assert str(caught.value).startswith(f"data_param.{place}: ")
    assert text in str(caught.value)


def test_backend_left_out_reads_an_lmdb_but_leveldb_is_refused(tmp_path: Path) -> None:
    path, _ = numbered(tmp_path / "db", 2)
    param = pb.DataParameter(source=str(path), batch_size=1)
    source = BatchSource(param, pb.TransformationParameter(), pb.TRAIN, 0, 0, fail)
    assert source.count == 2
    source.close()
    with pytest.raises(SpecError, match=r"data_param\.backend: LevelDB") as caught:
        _ = source_of(path, backend=pb.DataParameter.LEVELDB).count
    assert "set backend: LMDB" in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "batch", "shuffle", "noted"),
    [
        ([0] * 10 + [1] * 10, 4, False, 1),
        ([0] * 10 + [1] * 10, 4, True, 0),
        ([0] * 10 + [1] * 10, 11, False, 0),  # the first batch has both
        ([0] * 10 + [1] * 10 + [0] * 5, 4, False, 0),
        ([0, 1] * 10, 4, False, 0),
        ([7] * 20, 4, False, 0),
        ([number // 3 for number in range(600)], 3, False, 1),  # so many classes that each record looked at has one of its own
        ([number // 40 for number in range(160)], 50, False, 2),
        ([number // 40 for number in range(160)], 121, False, 0),
        ([0, 0, 1, 0] + [1] * 60 + [2] * 60, 4, False, 0),  # mixed where the batch is
        (list(range(20)), 1, False, 0),
        (list(range(20)), 5, False, 0),
        ([0] * 5 + [1], 8, False, 0),
    ],
)
def test_batches_of_few_classes_are_noted(tmp_path: Path, labels: list[int], batch: int, shuffle: bool, noted: int) -> None:
    image = np.zeros((1, 2, 2), np.uint8)
    path = write_lmdb(tmp_path / "db", [raw(image, label) for label in labels])
    source = source_of(path, batch, shuffle=shuffle)
    note = source.order_note()
    source.close()
    told = (
        f"the records of {path} lie class by class, and so a batch holds few of the classes, the first one {noted}: "
        "add shuffle: true to data_param, or convert the images again with --shuffle"
    )
    assert note == (told if noted else None)


def test_a_record_that_cannot_be_read_is_not_noted_but_told_in_its_turn(tmp_path: Path) -> None:
    good = raw(np.zeros((1, 2, 2), np.uint8))
    source = source_of(write_lmdb(tmp_path / "db", [good, good, b"no Datum", good]), 4)
    assert source.order_note() is None
    with pytest.raises(DataError, match="record '00000002'"):
        batches(source, 1)
    source.close()
