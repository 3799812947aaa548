"""caffelite preview: the pictures are what a run reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cli_harness import RECORDS, pixels, said, values
from data_samples import raw, write_lmdb
from PIL import Image

from caffelite import backends
from caffelite.data.images import decode_image
from caffelite.data.preview import GAP
from caffelite.net import Net
from caffelite.schema import net_from_text, pb

TRANSFORM = "crop_size: 6 mirror: true rotation: 20 max_zoom: 1.3 lighting: 0.1"
NET = 'layer { name: "data" type: "Data" top: "data" data_param { source: "db" batch_size: 24 backend: LMDB EXTRA } transform_param { TRANSFORM } }\n'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_lmdb(tmp_path / "db", values())
    return tmp_path


def write_net(transform: str = TRANSFORM, extra: str = "") -> str:
    text = NET.replace("TRANSFORM", transform).replace("EXTRA", extra)
    Path("net.prototxt").write_text(text)
    return text


def cell(picture: np.ndarray, row: int, column: int, side: int = 6) -> np.ndarray:
    top, left = (GAP + at * (side + GAP) for at in (row, column))
    return picture[:, top : top + side, left : left + side]


def test_a_row_is_an_image_as_stored_and_as_a_run_reads_it(capsys: pytest.CaptureFixture[str]) -> None:
    net = Net(net_from_text(write_net(), "net.prototxt"), phase=pb.TRAIN, backend=backends.get("numpy"), seed=5)
    write_net(TRANSFORM + " scale: 0.01 mean_value: 100", "shuffle: true cache: DEVICE")  # what the picture leaves out
    out, _ = said(capsys, "preview", "net.prototxt", "out.png", "--images", "5", "--draws", "3", "--seed", "5")
    assert out == "out.png: images of layer 'data' from db, each as stored and 3 times as drawn with seed 5\n"
    picture = decode_image(Path("out.png").read_bytes())
    assert picture.shape == (3, 5 * (6 + GAP) + GAP, 4 * (6 + GAP) + GAP)
    for row in range(5):
        np.testing.assert_array_equal(cell(picture, row, 0), pixels(row)[:, 1:7, 1:7])
    for epoch in range(3):
        net.forward()
        read = net.backend.to_host(net.blobs["data"].data)
        for row in range(5):
            np.testing.assert_array_equal(cell(picture, row, 1 + epoch), np.clip(np.rint(read[row]), 0, 255))
    net.close()
    gaps = np.ones(picture.shape[1:], bool)
    for row, column in np.ndindex(5, 4):
        cell(gaps[None], row, column)[...] = False
    assert (picture[:, gaps] == 255).all()


def test_gray_images_and_fewer_than_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = np.arange(35, dtype=np.uint8).reshape(1, 5, 7)
    write_lmdb(tmp_path / "gray", [raw(image), raw(image + 9)])
    Path("net.prototxt").write_text(NET.replace('"db"', '"gray"').replace("EXTRA", "").replace("TRANSFORM", "scale: 0.5"))
    assert "from gray, each as stored and once as drawn with seed 0" in said(capsys, "preview", "net.prototxt", "out.png", "--draws", "1")[0]
    with Image.open("out.png") as picture:
        assert (picture.mode, picture.size) == ("L", (2 * (7 + GAP) + GAP, 2 * (5 + GAP) + GAP))
        np.testing.assert_array_equal(np.asarray(picture)[-GAP - 5 : -GAP, -GAP - 7 : -GAP], image[0] + 9)


def test_what_cannot_be_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_net()
    assert "OUT.png is 'out.jpg', expected a name that ends in .png" in said(capsys, "preview", "net.prototxt", "out.jpg", status=2)[1]
    write_net("rotation: -1")
    assert "net.prototxt:1:" in said(capsys, "preview", "net.prototxt", "out.png", status=2)[1]
    write_lmdb(tmp_path / "floats", [pb.Datum(channels=1, height=2, width=2, float_data=[0.5] * 4).SerializeToString()])
    write_lmdb(tmp_path / "many", [raw(np.zeros((5, 2, 2), np.uint8))])
    for name, text in (("floats", "have floats, expected bytes"), ("many", "have 5 channels, expected bytes in 1 or 3 channels")):
        Path("net.prototxt").write_text(NET.replace('"db"', f'"{name}"').replace("EXTRA", "").replace("TRANSFORM", "scale: 1"))
        assert text in said(capsys, "preview", "net.prototxt", "out.png", status=1)[1]
    Path("net.prototxt").write_text('layer { name: "x" type: "Input" top: "x" input_param { shape { dim: 1 } } }')
    assert "the net has no Data layer in phase TRAIN" in said(capsys, "preview", "net.prototxt", "out.png", status=2)[1]
    assert not Path("out.png").exists()
    assert RECORDS == 24  # an epoch is a batch
