"""Damaged, missing and unfitting files through the command line: a short error, the right exit status, and nothing lost."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cli_harness import NET, SOLVER, TEST, TRAIN, make_run, pixels, said, values
from data_samples import photo, raw, save_image, write_lmdb
from PIL import Image
from small_disk import SmallDisk, small_disk_at

from caffelite.__main__ import main
from caffelite.schema import pb
from caffelite.schema.files import LARGEST_TEXT
from caffelite.solver.snapshot import find_newest


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained run."""
    return make_run(tmp_path_factory.mktemp("made"))


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder as the working folder."""
    shutil.copytree(made, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    monkeypatch.setenv("CAFFELITE_BACKEND", "numpy")
    return tmp_path / "run"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A place that is soon full."""
    (tmp_path / "small").mkdir()
    with small_disk_at(tmp_path / "small") as disk:
        yield disk


def outputs() -> dict[str, bytes]:
    """The files that training has left."""
    return {path.name: path.read_bytes() for path in Path("out").iterdir()}


def refused(capsys: pytest.CaptureFixture[str], *argv: str, status: int) -> str:
    """Runs a command that has to fail: its error, a few lines without a traceback."""
    _, err = said(capsys, *argv, status=status)
    assert err.startswith("caffelite: error: ")
    assert "Traceback" not in err
    assert err.count("\n") <= 4
    return err


def sparse(path: str | Path, size: int) -> None:
    """A file of zeros that takes no room on the disk."""
    with open(path, "wb") as file:
        file.truncate(size)


# --- prototxt ------------------------------------------------------------------------------------------------------------

JUNK = b"\xff" + random.Random(0).randbytes(3000)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: data.rindex(b'"')], 'no closing " on its line'),
        (lambda data: data[: data.rindex(b":")], "expected ':' after"),
        (lambda data: JUNK, "the file is binary"),
        (lambda data: b"\xe9\xe9" + data, "is not UTF-8"),
        (lambda data: data + b"#" * LARGEST_TEXT, "larger than 16 MiB"),
        (lambda data: data + b"layer " * 100_000, "to open 'layer'|no field 'layer'"),
        (None, "no such file|does not exist"),
    ],
    ids=["cut in a string", "cut after a name", "garbage", "latin-1", "huge", "long nonsense", "missing"],
)
@pytest.mark.parametrize("name", ["net.prototxt", "solver.prototxt"])
def test_prototxt(folder: Path, name: str, damage, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = outputs()
    content = Path(name).read_bytes()
    os.remove(name)
    if damage:
        Path(name).write_bytes(damage(content))
    for command in (TRAIN, ("check", "solver.prototxt"), ("summary", "solver.prototxt"), ("time", "--solver", "solver.prototxt")):
        err = refused(capsys, *command, status=2)
        assert any(part in err for part in message.split("|")), err
        assert name in err
    assert outputs() == before


# --- weights and states ---------------------------------------------------------------------------------------------------

BINARY = {
    "cut": (lambda data: data[: len(data) * 2 // 3], "is damaged or of another kind"),
    "garbage": (lambda data: JUNK, "is damaged or of another kind"),
    "empty": (lambda data: b"", "the file is empty"),
    "text": (lambda data: NET.encode(), "the file is text"),
}


@pytest.mark.parametrize("damage", [*BINARY, "huge", "missing"])
@pytest.mark.parametrize(
    ("command", "name"),
    [
        (TEST, "out/small_iter_4.caffemodel"),
        ((*TRAIN, "--weights"), "out/small_iter_4.caffemodel"),
        ((*TRAIN, "--snapshot"), "out/small_iter_4.solverstate"),
    ],
    ids=["test weights", "train weights", "state"],
)
def test_weights_and_states(folder: Path, command: tuple[str, ...], name: str, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = outputs()
    bad = f"bad{Path(name).suffix}"
    if damage == "huge":
        sparse(bad, 2**31)
        message = "2147483648 bytes are more than the 2147483647 that protobuf can hold"
    elif damage == "missing":
        message = "no such file"
    else:
        change, message = BINARY[damage]
        Path(bad).write_bytes(change(Path(name).read_bytes()))
    err = refused(capsys, *command, bad, status=1)
    assert err.startswith(f"caffelite: error: {bad}: ")
    assert message in err
    assert outputs() == before


def test_auto_passes_over_damaged_snapshots_and_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = Path("out/small_iter_4.caffemodel").read_bytes()
    Path("out/small_iter_4.caffemodel").write_bytes(whole[:-20])
    assert main([*TRAIN, "--snapshot", "auto"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("caffelite: warning: skipping snapshot out/small_iter_4.solverstate: out/small_iter_4.caffemodel: the file of ")
    assert out.startswith("resuming from out/small_iter_2.solverstate\n")
    assert Path("out/small_iter_4.caffemodel").read_bytes() == whole


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [("num_output: 4 k", "num_output: 5 k", "shape (4, 3, 3, 3)"), ("kernel_size: 3", "kernel_size: 3 bias_term: false", "2 parameter blob(s)")],
)
def test_weights_of_another_net(folder: Path, old: str, new: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("net.prototxt").write_text(NET.replace(old, new))
    for command in (TEST, (*TRAIN, "--weights")):
        err = refused(capsys, *command, "out/small_iter_4.caffemodel", status=1)
        assert "layer 'conv': out/small_iter_4.caffemodel has" in err
        assert message in err
    err = refused(capsys, *TRAIN, "--snapshot", "out/small_iter_4.solverstate", status=1)
    assert err.startswith("caffelite: error: out/small_iter_4.solverstate: ")
    assert ".caffemodel with --weights to start anew" in err


# --- data -------------------------------------------------------------------------------------------------------------------

SOURCE = "caffelite: error: net.prototxt:3:16: layer 'data': "


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", "the database is cut short"),
        ("garbage", "not an LMDB database"),
        ("empty", "the database file is empty"),
        ("huge", "not an LMDB database"),
        ("missing", "no such database"),
    ],
)
def test_databases(folder: Path, damage: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before, file = outputs(), Path("db/data.mdb")
    if damage == "missing":
        shutil.rmtree("db")
    elif damage == "huge":
        sparse(file, 2**36)
    else:
        data = file.read_bytes()
        file.write_bytes({"cut": data[: len(data) // 2], "garbage": JUNK * 10, "empty": b""}[damage])
    for command in (TRAIN, (*TEST, "out/small_iter_4.caffemodel")):
        err = refused(capsys, *command, status=1)
        assert err.startswith(SOURCE + "db: ")
        assert message in err
    assert "net.prototxt:3:16: layer 'data': db: " in refused(capsys, "check", "solver.prototxt", status=1)
    assert message in refused(capsys, "mean", "db", status=1)
    assert outputs() == before


def jpeg(size: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(photo(size, size)).save(file, "JPEG")
    return file.getvalue()


def monstrous(data: bytes) -> bytes:
    """The JPEG with a header that promises 65,500 x 65,500 pixels (start of frame: marker FFC0, length, precision, height, width)."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", 65500, 65500) + data[at + 4 :]


def encoded(data: bytes) -> bytes:
    return pb.Datum(data=data, encoded=True, label=1).SerializeToString()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"garbage", "is not a Datum"),
        (raw(pixels(0))[:-30], "is not a Datum"),
        (raw(pixels(0, 5)), "it is 5x5, smaller than crop_size 6"),
        (raw(pixels(0)[:1]), "it has 1 channel(s), the first record has 3"),
        (encoded(jpeg(64)[:-300]), "not a readable image"),
        (encoded(JUNK), "not a readable image"),
        (encoded(monstrous(jpeg(64))), "not a readable image"),
    ],
    ids=["garbage", "cut", "small", "gray", "cut JPEG", "garbage JPEG", "huge JPEG"],
)
def test_a_bad_record_ends_training_after_the_last_good_snapshot(folder: Path, record: bytes, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree("db")
    shutil.rmtree("out")
    write_lmdb(Path("db"), values({13: record}))  # in the third batch
    err = refused(capsys, *TRAIN, status=1)
    assert err.startswith("caffelite: error: db: layer 'data': record '00000013': ")
    assert message in err
    assert find_newest("out/small", pytest.fail) == Path("out/small_iter_2.solverstate")
    assert sorted(outputs()) == ["small_iter_2.caffemodel", "small_iter_2.solverstate", "small_metrics.jsonl"]
    assert json.loads(Path("out/small_metrics.jsonl").read_text().splitlines()[-1])["event"] == "snapshot"


def test_a_label_out_of_range_names_the_layer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("net.prototxt").write_text(NET.replace("inner_product_param { num_output: 4", "inner_product_param { num_output: 3"))
    err = refused(capsys, *TRAIN, status=1)
    assert err.startswith("caffelite: error: layer 'loss': label 3 ")


@pytest.mark.parametrize(
    ("old", "new", "place", "message", "status"),
    [
        ("crop_size: 6", "crop_size: 60", "3:77", "crop_size is 60, but the images are 8x8", 2),
        ("crop_size: 6", 'mean_file: "none"', "3:77", "mean_file cannot be used: none: no such file", 1),
        ("crop_size: 6", 'mean_file: "net.prototxt"', "3:77", "mean_file cannot be used: net.prototxt: the file is text", 1),
        ('source: "db"', 'source: "net.prototxt"', "3:16", "this is not an LMDB database", 1),
        ("kernel_size: 3", "kernel_size: 30", "4:", "kernel", 2),
        ('bottom: "ip" bottom: "label"', 'bottom: "ip" bottom: "data"', "6:", "label", 2),
    ],
)
def test_files_and_shapes_that_do_not_fit_have_a_place(folder: Path, old: str, new: str, place: str, message: str, status: int, capsys) -> None:
    """What check and train say of them, with the same exit status."""
    Path("net.prototxt").write_text(NET.replace(old, new))
    for command in (("check", "net.prototxt"), TRAIN, (*TEST, "out/small_iter_4.caffemodel")):
        err = refused(capsys, *command, status=status)
        assert err.startswith(f"caffelite: error: net.prototxt:{place}")
        assert message in err


def test_check_fails_as_training_would(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1 where a file that is named is missing, 2 where a net or a solver is wrong too."""
    Path("gone.prototxt").write_text(NET.replace('"db"', '"gone"'))
    Path("wrong.prototxt").write_text(NET.replace("num_output: 4", "num_outputs: 4"))
    solvers = {name: Path("solver.prototxt").read_text().replace("net.prototxt", name) for name in ("gone.prototxt", "wrong.prototxt")}
    for name, status in (("gone.prototxt", 1), ("wrong.prototxt", 2)):
        Path("other.prototxt").write_text(solvers[name])
        for command in (("check", name), ("check", "other.prototxt"), ("train", "--solver", "other.prototxt"), ("preview", name, "out.png")):
            refused(capsys, *command, status=status)
    refused(capsys, "check", "gone.prototxt", "wrong.prototxt", "net.prototxt", status=2)
    refused(capsys, "check", "wrong.prototxt", "gone.prototxt", "net.prototxt", status=2)
    refused(capsys, "check", "net.prototxt", "gone.prototxt", status=1)


@pytest.mark.parametrize("old", ["batch_size: 6", "num_output: 4 weight"])
def test_sizes_beyond_every_memory(folder: Path, old: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = old.split(":")[0]
    Path("net.prototxt").write_text(NET.replace(old, f"{name}: 4294967295 {old.partition(' weight')[1]}"))
    assert "not enough memory" in refused(capsys, *TRAIN, status=1)


# --- divergence -------------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_the_layer_and_keeps_the_last_good_snapshot(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree("out")
    rates = 'lr_policy: "multistep" gamma: 1e30 stepvalue: 6'
    Path("solver.prototxt").write_text(SOLVER.replace('lr_policy: "fixed"', rates).replace("max_iter: 4", "max_iter: 40"))
    err = refused(capsys, *TRAIN, status=1)
    assert err.startswith("caffelite: error: the loss is ")
    assert " in iteration 7: layer 'ip' (InnerProduct): its top 'ip' is not finite\n" in err
    assert "the last good snapshot is out/small_iter_6.solverstate; try a lower base_lr" in err
    assert find_newest("out/small", pytest.fail) == Path("out/small_iter_6.solverstate")
    for name, data in outputs().items():
        if name.endswith(".caffemodel"):
            blobs = [blob for layer in pb.NetParameter.FromString(data).layer for blob in layer.blobs]
            assert all(np.isfinite(blob.data).all() for blob in blobs)


# --- full disks -------------------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_during_training_keeps_the_last_snapshot(folder: Path, small_disk: SmallDisk) -> None:
    """The run goes on from iteration 4 until a snapshot does not fit; from the one before it can go on again."""
    for path in Path("out").glob("small_iter_4.*"):
        shutil.copy(path, small_disk.path)
    small_disk.limit = 1000  # less than a snapshot
    prefix = f"{small_disk.path}/small"
    Path("solver.prototxt").write_text(SOLVER.replace("out/small", prefix).replace("max_iter: 4", "max_iter: 4000"))
    run = small_disk.run(*TRAIN, "--snapshot", f"{prefix}_iter_4.solverstate")
    assert run.returncode == 1, run
    assert "cannot write" in run.stderr
    assert "the disk or quota is full: make room; files written before are whole" in run.stderr
    newest = find_newest(prefix, pytest.fail)
    assert newest is not None
    assert [path for path in small_disk.path.iterdir() if "partial" in path.name] == []
    assert main([*TRAIN, "--snapshot", str(newest), "--iterations", "1", "--metrics", "resumed.jsonl"]) == 0


def test_a_disk_that_fills_up_during_conversion_keeps_nothing_half(tmp_path: Path, small_disk: SmallDisk) -> None:
    for i in range(120):
        save_image(tmp_path / "src/a" / f"{i}.png", np.random.default_rng(i).integers(0, 256, (100, 100, 3), np.uint8))  # 3.6 MB of pixels
    run = small_disk.run("convert", "imagefolder", str(tmp_path / "src"), f"{small_disk.path}/db", "--threads", "1")
    assert run.returncode == 1, run
    assert "the database cannot be written" in run.stderr
    assert "the disk or quota may be full: make room and start again" in run.stderr
    assert list(small_disk.path.iterdir()) == []


def test_a_disk_without_a_free_byte(tmp_path: Path, small_disk: SmallDisk) -> None:
    """LMDB's lock file is written through a memory map, where a full disk is a signal and not an error."""
    save_image(tmp_path / "src/a/x.png", photo())
    small_disk.fill()
    run = small_disk.run("convert", "imagefolder", str(tmp_path / "src"), f"{small_disk.path}/db")
    assert run.returncode == 1, run
    assert "full" in run.stderr
    assert [path.name for path in small_disk.path.iterdir()] == ["filler"]


def test_a_bad_record_met_while_labels_are_counted_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree("db")
    write_lmdb(Path("db"), values({20: b"garbage"}))
    Path("net.prototxt").write_text(NET + 'layer { name: "accuracy" type: "Accuracy" bottom: "ip" bottom: "label" top: "accuracy" }')
    Path("solver.prototxt").write_text(SOLVER + "test_interval: 2")
    assert refused(capsys, *TRAIN, status=1).startswith("caffelite: error: db: record '00000020': a record of 7 bytes is not a Datum")
