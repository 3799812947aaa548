"""What `caffelite convert` says of a source that will not train as it is, and `caffelite check` of a database like that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cli_harness import NET, pixels, said
from data_samples import raw, write_lmdb
from PIL import Image


def save(path: Path, height: int = 9, width: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)).save(path)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: src/ with seven classes of two images of one size."""
    monkeypatch.chdir(tmp_path)
    for label in "abcdefg":
        for number in range(2):
            save(tmp_path / "src" / label / f"{number}.png")
    return Path("src")


def test_classes_are_listed(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = said(capsys, "convert", "imagefolder", "src", "db")
    assert "\n7 classes: 0 a, 1 b, 2 c, 3 d, 4 e, ..., 6 g\n" in out
    assert "warning" not in err
    Path("list.txt").write_text("src/a/0.png 3\n")
    assert "classes" not in said(capsys, "convert", "list", "list.txt", "listed")[0]


@pytest.mark.parametrize("flags", [(), ("--encoded",), ("--threads", "2")], ids=["raw", "encoded", "threads"])
def test_images_of_several_sizes(source: Path, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caffelite.data.decoding._FEW", 1)  # so that processes are started where there may be several
    save(source / "b" / "wide.png", 7, 20)
    _, err = said(capsys, "convert", "imagefolder", "src", "db", *flags)
    assert err.splitlines()[-1] == (
        "caffelite: warning: the images are not all of one size (heights from 7 to 9, widths from 8 to 20): "
        "a net that reads them needs a crop_size of at most 7; or convert them with --resize"
    )
    assert "warning" not in said(capsys, "convert", "imagefolder", "src", "resized", *flags, "--resize", "8x8")[1]


def test_a_folder_too_high(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source.rename("all_train")
    Path("set").mkdir()
    Path("all_train").rename("set/train")
    save(Path("set/val/a/0.png"))
    out, err = said(capsys, "convert", "imagefolder", "set", "db")
    assert "2 classes: 0 train, 1 val\n" in out
    assert (
        "caffelite: warning: set: the 2 folders taken for classes (train, val) hold no images but folders, up to 7; "
        "if those are the classes, convert each part by itself, set/train say\n"
    ) in err
    assert "warning" not in said(capsys, "convert", "imagefolder", "set/train", "right")[1]


def test_one_folder_inside_each_class_is_usual(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for label in "ab":
        save(tmp_path / "src" / label / "images" / "0.png")
    assert "warning" not in said(capsys, "convert", "imagefolder", str(tmp_path / "src"), str(tmp_path / "db"))[1]


def test_check_finds_images_of_several_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write_lmdb(Path("db"), [raw(pixels(i), i % 4) for i in range(200)])
    Path("net.prototxt").write_text(NET)
    assert "net.prototxt: OK" in said(capsys, "check", "net.prototxt")[0]
    Path("net.prototxt").write_text(NET.replace("crop_size: 6 ", ""))
    assert "net.prototxt: OK" in said(capsys, "check", "net.prototxt")[0]
    write_lmdb(Path("mixed"), [raw(pixels(i, 11 if i > 130 else 8), i % 4) for i in range(200)])
    Path("net.prototxt").write_text(NET.replace("crop_size: 6 ", "").replace('"db"', '"mixed"'))
    _, err = said(capsys, "check", "net.prototxt", status=1)
    assert "layer 'data': mixed: record '00000132': the images are not all of one size: 8x8 and 11x11 are among them (height x width)" in err
    assert "  give the layer a crop_size, or convert the images again with --resize" in err


def test_records_class_by_class_are_told_when_converted_checked_and_trained_on(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = said(capsys, "convert", "imagefolder", "src", "db")
    assert "\ndb: class by class; where it is to train a net, say shuffle: true in data_param, or convert with --shuffle\n" in out
    assert "class by class" not in said(capsys, "convert", "imagefolder", "src", "mixed", "--shuffle")[0]
    Path("one").mkdir()
    Path("src/a").rename("one/a")
    assert "class by class" not in said(capsys, "convert", "imagefolder", "one", "alone")[0]
    text = """name: "n" layer { name: "data" type: "Data" top: "data" top: "label" data_param { source: "db" backend: LMDB batch_size: 2 } }
    layer { name: "ip" type: "InnerProduct" bottom: "data" top: "ip" inner_product_param { num_output: 7 weight_filler { type: "xavier" } } }
    layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }"""
    Path("solver.prototxt").write_text('net: "net.prototxt" base_lr: 1e-9 lr_policy: "fixed" max_iter: 1 snapshot_prefix: "out"')
    for net, told in ((text, 1), (text.replace("batch_size: 2", "batch_size: 2 shuffle: true"), 0), (text.replace('"db"', '"alone"'), 0)):
        Path("net.prototxt").write_text(net)
        for command in (("check", "net.prototxt"), ("train", "--solver", "solver.prototxt", "--backend", "numpy")):
            out, _ = said(capsys, *command)
            assert out.count("warning: layer 'data': the records of db lie class by class") == told
