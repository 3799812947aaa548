"""Conversion of folders, lists and Tiny ImageNet: records as Caffe's convert_imageset writes them."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import photo, save_image
from PIL import Image

from caffelite.data.convert import ConvertReport, convert_dataset
from caffelite.data.images import decode_image
from caffelite.data.lmdb_source import Database
from caffelite.errors import DataError, SpecError
from caffelite.schema import pb


def records(path: Path) -> list[tuple[str, bytes]]:
    with Database(path) as database:
        reader = database.reader()
        found = [(key.decode(), bytes(value)) for key, value in reader.read(range(database.count), ordered=True)]
        reader.close()
    return found


def labels(path: Path) -> dict[str, int]:
    return {key[9:]: pb.Datum.FromString(value).label for key, value in records(path)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, name in enumerate(("cat/a_10.png", "cat/a_2.png", "dog/deep/x.PNG", "ant/y.bmp")):
        save_image(tmp_path / "src" / name, photo(seed=i))
    (tmp_path / "src" / "cat" / "notes.txt").write_text("no image")
    return tmp_path / "src"


def test_raw_records_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    report = convert_dataset("imagefolder", folder, tmp_path / "db")
    found = records(tmp_path / "db")
    assert [key for key, _ in found] == ["00000000_ant/y.bmp", "00000001_cat/a_2.png", "00000002_cat/a_10.png", "00000003_dog/deep/x.PNG"]
    planes = photo(seed=1)[:, :, ::-1].transpose(2, 0, 1).tobytes()
    # Datum by hand: channels, height, width, data, label, encoded in the order of their numbers (protobuf encoding)
    header = bytes([0x08, 3, 0x10, 20, 0x18, 24, 0x22]) + bytes([0x80 | 1440 & 0x7F, 1440 >> 7])
    assert found[1][1] == header + planes + bytes([0x28, 1, 0x38, 0])
    digest = hashlib.sha256(b"".join(key.encode() + value for key, value in found)).hexdigest()
    assert (report.count, report.checksum, report.bad) == (4, digest, [])
    assert (tmp_path / "db.labels.txt").read_text() == "ant\ncat\ndog\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["db", "db.labels.txt", "src"]
    assert sorted(path.name for path in (tmp_path / "db").iterdir()) == ["data.mdb", "lock.mdb"]


def test_classes_follow_wnids(folder: Path, tmp_path: Path) -> None:
    (folder / "wnids.txt").write_text("dog\nant\n")
    convert_dataset("imagefolder", folder, tmp_path / "db")
    assert labels(tmp_path / "db") == {"dog/deep/x.PNG": 0, "ant/y.bmp": 1}


@pytest.mark.parametrize("threads", [1, 3])
def test_many_images_on_several_processes_keep_their_order(tmp_path: Path, threads: int) -> None:
    for i in range(400):
        save_image(tmp_path / "src" / f"c{i % 3}" / f"{i}.png", np.full((4, 5), i % 256, np.uint8))
    seen: list[tuple[int, int]] = []
    report = convert_dataset("imagefolder", tmp_path / "src", tmp_path / "db", threads=threads, gray=True, progress=lambda *done: seen.append(done))
    assert report.count == 400
    assert seen[-1] == (400, 400)
    found = records(tmp_path / "db")
    assert [key[:8] for key, _ in found] == [f"{i:08d}" for i in range(400)]
    for key, value in found:
        number = int(Path(key).stem)
        assert pb.Datum.FromString(value).data == bytes([number % 256]) * 20
        assert pb.Datum.FromString(value).label == number % 3


def test_shuffle_numbers_keys_after_shuffling_and_depends_on_the_seed_alone(folder: Path, tmp_path: Path) -> None:
    keys = []
    for i, seed in enumerate((1, 1, 2, 3)):
        convert_dataset("imagefolder", folder, tmp_path / f"db{i}", shuffle=True, seed=seed)
        found = [key for key, _ in records(tmp_path / f"db{i}")]
        assert [key[:9] for key in found] == [f"{j:08d}_" for j in range(4)]
        keys.append([key[9:] for key in found])
    assert keys[0] == keys[1]
    assert len({tuple(order) for order in keys}) > 1
    assert {tuple(sorted(order)) for order in keys} == {tuple(sorted(keys[0]))}


def test_resize_and_gray(tmp_path: Path) -> None:
    save_image(tmp_path / "src/a/x.png", photo(40, 40))
    convert_dataset("imagefolder", tmp_path / "src", tmp_path / "db", resize=(10, 20), gray=True)
    datum = pb.Datum.FromString(records(tmp_path / "db")[0][1])
    assert (datum.channels, datum.height, datum.width) == (1, 10, 20)
    luma = photo(40, 40).astype(float) @ [0.299, 0.587, 0.114]
    blocks = luma.reshape(10, 4, 20, 2).mean((1, 3))
    assert np.abs(np.frombuffer(datum.data, np.uint8).reshape(10, 20) - blocks).mean() < 6


def test_gray_files_become_three_channels(tmp_path: Path) -> None:
    save_image(tmp_path / "src/a/x.png", photo(channels=1))
    convert_dataset("imagefolder", tmp_path / "src", tmp_path / "db")
    datum = pb.Datum.FromString(records(tmp_path / "db")[0][1])
    assert datum.data == photo(channels=1).tobytes() * 3


@pytest.mark.parametrize(
    ("options", "name", "untouched"),
    [
        ({"encoded": True}, "x.jpg", True),
        ({"encoded": True}, "x.JPEG", True),
        ({"encode_type": "jpg"}, "x.jpeg", True),
        ({"encode_type": "png"}, "x.jpg", False),
        ({"encoded": True, "resize": (40, 40)}, "x.jpg", False),
        ({"encoded": True}, "x.bmp", False),
    ],
)
def test_encoded_records(tmp_path: Path, options: dict[str, Any], name: str, untouched: bool) -> None:
    file = save_image(tmp_path / "src/a" / name, photo(80, 80))
    convert_dataset("imagefolder", tmp_path / "src", tmp_path / "db", **options)
    datum = pb.Datum.FromString(records(tmp_path / "db")[0][1])
    assert [field.name for field, _ in datum.ListFields()] == ["data", "label", "encoded"]
    assert (datum.data == file.read_bytes()) == untouched
    with Image.open(file) as image:
        expected = np.asarray(image if "resize" not in options else image.resize((40, 40), Image.Resampling.BILINEAR))
    difference = np.abs(decode_image(datum.data).transpose(1, 2, 0)[:, :, ::-1].astype(int) - expected)
    assert difference.mean() < (10 if "resize" in options else 0.01)  # JPEG halves the colours' resolution


def test_list_splits_at_the_last_space_and_takes_a_root(tmp_path: Path) -> None:
    save_image(tmp_path / "images/my cat.png", photo())
    save_image(tmp_path / "images/b.png", photo(seed=1))
    (tmp_path / "list.txt").write_text("my cat.png 7\n\nb.png 300\n")
    convert_dataset("list", tmp_path / "list.txt", tmp_path / "db", root=tmp_path / "images")
    assert labels(tmp_path / "db") == {"my cat.png": 7, "b.png": 300}
    assert [key for key, _ in records(tmp_path / "db")] == ["00000000_my cat.png", "00000001_b.png"]


@pytest.mark.parametrize("line", ["a.png", "a.png x", "a.png -1", "a.png 99999999999", " 5"])
def test_bad_list_lines_are_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "list.txt").write_text(f"ok.png 1\n{line}\n")
    with pytest.raises(DataError, match="expected PATH LABEL") as caught:
        convert_dataset("list", tmp_path / "list.txt", tmp_path / "db")
    assert str(caught.value).startswith(f"{tmp_path / 'list.txt'}:2: ")


def tiny(folder: Path) -> Path:
    for i, wnid in enumerate(("n02", "n01")):
        for j in range(3):
            save_image(folder / "train" / wnid / "images" / f"{wnid}_{j}.JPEG", photo(64, 64, seed=9 * i + j))
    for j in range(2):
        save_image(folder / "val/images" / f"val_{j}.JPEG", photo(64, 64, seed=50 + j, channels=1))
    (folder / "wnids.txt").write_text("n02\nn01\n")
    (folder / "words.txt").write_text("n01\tcat, house cat\nn02\tdog\nn03\tcow\n")
    (folder / "val/val_annotations.txt").write_text("val_0.JPEG\tn01\t0\t0\t1\t1\nval_1.JPEG\tn02\t0\t0\t1\t1\n")
    return folder


def test_tiny_imagenet(tmp_path: Path) -> None:
    report = convert_dataset("tiny-imagenet", tiny(tmp_path / "src"), tmp_path / "out")
    assert [(Path(database.path).name, database.count) for database in report.databases] == [("train_lmdb", 6), ("val_lmdb", 2)]
    assert report.count == 8
    assert (tmp_path / "out/labels.txt").read_text() == "n02\nn01\n"
    assert (tmp_path / "out/words.txt").read_text() == "dog\ncat, house cat\n"
    assert labels(tmp_path / "out/val_lmdb") == {"val/images/val_0.JPEG": 1, "val/images/val_1.JPEG": 0}
    assert labels(tmp_path / "out/train_lmdb")["train/n02/images/n02_2.JPEG"] == 0


def test_validation_images_in_folders_of_their_classes(tmp_path: Path) -> None:
    """As some scripts sort them; with the annotations, these count."""
    source = tiny(tmp_path / "src")
    for number, wnid in ((0, "n01"), (1, "n02")):
        (source / "val" / wnid).mkdir()
        (source / f"val/images/val_{number}.JPEG").rename(source / f"val/{wnid}/val_{number}.JPEG")
    (source / "val/val_annotations.txt").unlink()
    told: list[str] = []
    convert_dataset("tiny-imagenet", source, tmp_path / "out", tell=told.append)
    assert labels(tmp_path / "out/val_lmdb") == {"val/n01/val_0.JPEG": 1, "val/n02/val_1.JPEG": 0}
    assert told == []
    shutil.rmtree(source / "val/n01")
    with pytest.raises(DataError, match="n01: no such folder, though it is named as a class"):
        convert_dataset("tiny-imagenet", source, tmp_path / "out2")


def test_a_set_without_validation_is_warned_of(tmp_path: Path) -> None:
    source = tiny(tmp_path / "src")
    (source / "val/val_annotations.txt").unlink()
    told: list[str] = []
    report = convert_dataset("tiny-imagenet", source, tmp_path / "out", tell=told.append)
    assert [Path(database.path).name for database in report.databases] == ["train_lmdb"]
    assert told == [f"{source} has neither val/val_annotations.txt nor a folder of each class in val: no database for validation is written"]
    convert_dataset("tiny-imagenet", source, tmp_path / "out2", split="train", tell=told.append)
    assert len(told) == 1


def test_one_split_only(tmp_path: Path) -> None:
    convert_dataset("tiny-imagenet", tiny(tmp_path / "src"), tmp_path / "out", split="val")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["labels.txt", "val_lmdb", "words.txt"]
    with pytest.raises(DataError, match="no part 'test', found train, val"):
        convert_dataset("tiny-imagenet", tmp_path / "src", tmp_path / "out2", split="test")


def test_wrong_layouts_say_what_is_expected(tmp_path: Path) -> None:
    tiny(tmp_path / "outer" / "tiny-imagenet-200")
    with pytest.raises(DataError, match=r"did you mean .*tiny-imagenet-200"):
        convert_dataset("tiny-imagenet", tmp_path / "outer", tmp_path / "db")
    (tmp_path / "outer/tiny-imagenet-200/val/val_annotations.txt").write_text("val_0.JPEG\tn99\n")
    with pytest.raises(DataError, match=r"val_annotations.txt:1: expected an image and a class"):
        convert_dataset("tiny-imagenet", tmp_path / "outer/tiny-imagenet-200", tmp_path / "db")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="found no images"):
        convert_dataset("imagefolder", tmp_path / "empty", tmp_path / "db")
    with pytest.raises(DataError, match=r"no such file or folder\n  is the path right, seen from /"):
        convert_dataset("imagefolder", tmp_path / "none", tmp_path / "db")
    with pytest.raises(SpecError, match="unknown kind"):
        convert_dataset("folder", tmp_path, tmp_path / "db")
    with pytest.raises(SpecError, match="cannot encode as 'gif'"):
        convert_dataset("imagefolder", tmp_path, tmp_path / "db", encode_type="gif")
    assert not (tmp_path / "db").exists()


@pytest.mark.testdata
def test_caffes_own_conversion_of_the_same_files(testdata: Path, tmp_path: Path) -> None:
    golden = records(testdata / "golden/training/lmdb")
    with tarfile.open(testdata / "data/tiny-imagenet-20.tar") as archive:
        wanted = {f"tiny-imagenet-20/{key[9:]}" for key, _ in golden}
        members = [member for member in archive.getmembers() if member.name in wanted]
        archive.extractall(tmp_path, members, filter="data")
    lines = [f"{key[9:]} {pb.Datum.FromString(value).label}\n" for key, value in golden]
    (tmp_path / "list.txt").write_text("".join(lines))
    report: ConvertReport = convert_dataset("list", tmp_path / "list.txt", tmp_path / "db", root=tmp_path / "tiny-imagenet-20")
    assert report.count == 200
    assert records(tmp_path / "db") == golden
