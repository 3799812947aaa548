"""The mean image: exact sums, Caffe's file layout, and records that do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_samples import numbered, photo, raw, write_lmdb

from caffelite.data.images import encode_image
from caffelite.data.mean import channel_means, compute_mean, write_mean
from caffelite.errors import DataError, SnapshotError
from caffelite.schema import pb


def test_mean_of_bytes_and_its_file(tmp_path: Path) -> None:
    path, images = numbered(tmp_path / "db", 300)
    calls: list[tuple[int, int]] = []
    mean = compute_mean(path, lambda done, total: calls.append((done, total)))
    np.testing.assert_allclose(mean, images.astype(np.float64).mean(0), rtol=1e-7)
    assert mean.dtype == np.float32
    assert calls[-1] == (300, 300)
    np.testing.assert_allclose(channel_means(mean), images.mean((0, 2, 3)), rtol=1e-6)
    write_mean(mean, tmp_path / "mean.binaryproto")
    blob = pb.BlobProto.FromString((tmp_path / "mean.binaryproto").read_bytes())
    assert [field.name for field, _ in blob.ListFields()] == ["num", "channels", "height", "width", "data"]
    assert (blob.num, blob.channels, blob.height, blob.width) == (1, 3, 8, 10)
    np.testing.assert_array_equal(np.array(blob.data, np.float32), mean.ravel())


def test_mean_of_encoded_and_float_records(tmp_path: Path) -> None:
    planes = photo()[:, :, ::-1].transpose(2, 0, 1)
    values = [
        pb.Datum(data=encode_image(planes, "png"), encoded=True).SerializeToString(),
        pb.Datum(channels=3, height=20, width=24, float_data=np.full(1440, 0.5)).SerializeToString(),
    ]
    np.testing.assert_allclose(compute_mean(write_lmdb(tmp_path / "db", values)), (planes + 0.5) / 2)


def test_records_of_differing_sizes(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "db", [raw(np.zeros((3, 4, 4), np.uint8)), raw(np.zeros((3, 4, 5), np.uint8))])
    with pytest.raises(DataError, match="record number 1 is 3x4x5, the first one 3x4x4"):
        compute_mean(path)


def test_errors_name_the_place(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such database"):
        compute_mean(tmp_path / "none")
    with pytest.raises(DataError, match="holds no records"):
        compute_mean(write_lmdb(tmp_path / "empty", []))
    with pytest.raises(DataError, match=r"record '00000000': .* is not a Datum"):
        compute_mean(write_lmdb(tmp_path / "bad", [b"garbage"]))
    with pytest.raises(SnapshotError, match="cannot write"):
        write_mean(np.zeros((1, 2, 2), np.float32), tmp_path / "none" / "m")
