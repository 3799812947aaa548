"""Conversion of MNIST and CIFAR-10 files, with Caffe's keys and planes."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import Pixels, save_image

from caffelite.data.convert import convert_dataset
from caffelite.data.lmdb_source import Database
from caffelite.errors import DataError, SpecError
from caffelite.schema import pb


def records(path: Path) -> list[tuple[bytes, Any]]:
    with Database(path) as database:
        reader = database.reader()
        found = [(key, pb.Datum.FromString(bytes(value))) for key, value in reader.read(range(database.count), ordered=True)]
        reader.close()
    return found


def idx(values: Pixels) -> bytes:
    return struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_idx(tmp_path: Path, rng: np.random.Generator, packed: bool) -> None:
    images, digits = rng.integers(0, 256, (12, 28, 28), np.uint8), rng.integers(0, 10, 12, np.uint8)
    for prefix in ("train", "t10k"):
        for name, values in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", digits)):
            content = idx(values)
            (tmp_path / (f"{prefix}-{name}" + (".gz" if packed else ""))).write_bytes(gzip.compress(content) if packed else content)
    report = convert_dataset("mnist", tmp_path, tmp_path / "out")
    assert [Path(database.path).name for database in report.databases] == ["train_lmdb", "test_lmdb"]
    for i, (key, datum) in enumerate(records(tmp_path / "out/train_lmdb")):
        assert key == b"%08d" % i
        assert [field.name for field, _ in datum.ListFields()] == ["channels", "height", "width", "data", "label"]
        assert (datum.channels, datum.height, datum.width, datum.label) == (1, 28, 28, digits[i])
        assert datum.data == images[i].tobytes()


def test_mnist_folders(tmp_path: Path) -> None:
    for digit in range(3):
        save_image(tmp_path / "src/training" / str(digit) / "1.png", np.full((28, 28), digit, np.uint8))
    convert_dataset("mnist", tmp_path / "src", tmp_path / "out")
    found = records(tmp_path / "out/train_lmdb")
    assert [(key, datum.channels, datum.label, datum.data[0]) for key, datum in found] == [(b"%08d_%d/1.png" % (i, i), 1, i, i) for i in range(3)]


@pytest.mark.parametrize(
    ("images", "labels", "text"),
    [
        (b"junk", idx(np.zeros(2, np.uint8)), "not an idx file"),
        (idx(np.zeros((2, 28, 28), np.uint8))[:-5], idx(np.zeros(2, np.uint8)), "promises 2x28x28 values, found 1563"),
        (idx(np.zeros((2, 28, 28), np.uint8)), idx(np.zeros(3, np.uint8)), "3 labels for the 2 images"),
    ],
)
def test_bad_idx_files(tmp_path: Path, images: bytes, labels: bytes, text: str) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(images)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels)
    with pytest.raises(DataError, match=text):
        convert_dataset("mnist", tmp_path, tmp_path / "out")


def test_a_broken_gzip_is_an_error(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(idx(np.zeros((2, 28, 28), np.uint8))))
    packed[12] ^= 0xFF
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(packed)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(2, np.uint8)))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: cannot be read"):
        convert_dataset("mnist", tmp_path, tmp_path / "out")


@pytest.mark.parametrize("kind", ["bin", "py"])
def test_cifar10(tmp_path: Path, rng: np.random.Generator, kind: str) -> None:
    pixels, classes = rng.integers(0, 256, (6, 4, 3, 32, 32), np.uint8), rng.integers(0, 10, (6, 4))
    for i, name in enumerate([f"data_batch_{j}" for j in range(1, 6)] + ["test_batch"]):
        rows = pixels[i].reshape(4, -1)
        if kind == "bin":
            (tmp_path / f"{name}.bin").write_bytes(np.hstack([classes[i].astype(np.uint8)[:, None], rows]).tobytes())
        else:
            (tmp_path / name).write_bytes(pickle.dumps({b"data": rows, b"labels": classes[i].tolist()}, 2))
    report = convert_dataset("cifar10", tmp_path, tmp_path / "out")
    assert [database.count for database in report.databases] == [20, 4]
    for i, (key, datum) in enumerate(records(tmp_path / "out/train_lmdb")):
        assert key == b"%05d" % i
        assert (datum.channels, datum.height, datum.width, datum.label) == (3, 32, 32, classes[i // 4, i % 4])
        assert datum.data == pixels[i // 4, i % 4].tobytes()
    assert (tmp_path / "out/labels.txt").read_text().split()[:2] == ["airplane", "automobile"]


class Harmful:
    """Would make a folder when unpickled carelessly."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": Harmful(str(tmp_path / "harm"))}))
    with pytest.raises(DataError, match=r"not a CIFAR-10 Python batch: it asks for posix.mkdir"):
        convert_dataset("cifar10", tmp_path, tmp_path / "out")
    assert not (tmp_path / "harm").exists()


def test_missing_and_cut_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no CIFAR-10 batches"):
        convert_dataset("cifar10", tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match="found no MNIST files"):
        convert_dataset("mnist", tmp_path, tmp_path / "out")
    (tmp_path / "test_batch.bin").write_bytes(bytes(3072))
    with pytest.raises(DataError, match="3072 bytes are no whole number of records of 3073"):
        convert_dataset("cifar10", tmp_path, tmp_path / "out")


@pytest.mark.parametrize("options", [{"resize": (8, 8)}, {"gray": True}, {"encoded": True}, {"encode_type": "png"}])
def test_options_that_only_files_have(tmp_path: Path, options: dict[str, Any]) -> None:
    (tmp_path / "test_batch.bin").write_bytes(bytes(3073))
    with pytest.raises(SpecError, match="do not go with cifar10 files"):
        convert_dataset("cifar10", tmp_path, tmp_path / "out", **options)
