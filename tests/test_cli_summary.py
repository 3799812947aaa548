"""caffelite summary where there is no data to ask for the images' size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cli_harness import NET, said
from data_samples import raw, write_lmdb

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a net and nothing else."""
    monkeypatch.chdir(tmp_path)
    Path("net.prototxt").write_text(NET)
    return tmp_path


def test_crop_size_is_taken_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = said(capsys, "summary", "net.prototxt")
    assert err == ""
    assert out.splitlines()[1] == "note: layer 'data': db: no such database; images of 3x6x6 are assumed (--image CxHxW gives another size)"
    found = json.loads(said(capsys, "summary", "net.prototxt", "--json")[0])["nets"][0]
    assert len(found["notes"]) == 1
    assert [top["shape"] for top in found["layers"][0]["tops"]] == [[6, 3, 6, 6], [6]]
    assert found["parameters"] == 4 * 27 + 4 + 4 * 64 + 4


@pytest.mark.parametrize(("transform", "channels"), [("mean_value: 1 mean_value: 2", 2), ("mean_value: 1", 3), ("force_gray: true", 1)])
def test_channels_follow_from_the_transform(transform: str, channels: int, capsys: pytest.CaptureFixture[str]) -> None:
    Path("net.prototxt").write_text(NET.replace("scale: 0.01", transform))
    assert f"images of {channels}x6x6 are assumed" in said(capsys, "summary", "net.prototxt")[0]


def test_a_size_may_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    Path("net.prototxt").write_text(NET.replace("crop_size: 6", 'mean_file: "none"'))
    _, err = said(capsys, "summary", "net.prototxt", status=1)
    assert err == "caffelite: error: net.prototxt:3:16: layer 'data': db: no such database\n" + (
        "  say how large its images are, as in --image 3x64x64; or make the database with `caffelite convert`\n"
    )
    found = json.loads(said(capsys, "summary", "net.prototxt", "--image", "1x20x10", "--json")[0])["nets"][0]
    assert (found["notes"], found["layers"][0]["tops"][0]["shape"]) == ([], [6, 1, 20, 10])
    Path("net.prototxt").write_text(NET)
    assert "crop_size is 6, but the images are 5x9" in said(capsys, "summary", "net.prototxt", "--image", "3x5x9", status=2)[1]
    assert "'64x64' is not CHANNELSxHEIGHTxWIDTH, 3x64x64 say" in said(capsys, "summary", "net.prototxt", "--image", "64x64", status=2)[1]


def test_a_net_without_a_loss_has_no_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "summary", str(ROOT / "models/lenet/deploy.prototxt"))[0]
    assert "parameters     431,080 (1.6 MB)\n" in out
    assert " at the peak for activations (" in out
    train = said(capsys, "summary", str(ROOT / "models/lenet/train_val.prototxt"), "--image", "1x28x28")[0]
    assert "parameters     431,080 (1.6 MB, as much again for gradients)\n" in train
    assert " at the peak for activations and their gradients (" in train


def test_a_mean_that_cannot_be_read_changes_no_shape(capsys: pytest.CaptureFixture[str]) -> None:
    write_lmdb(Path("db"), [raw(np.zeros((1, 9, 8), np.uint8))])
    Path("net.prototxt").write_text(NET.replace("scale: 0.01", 'mean_file: "none"'))
    found = json.loads(said(capsys, "summary", "net.prototxt", "--json")[0])["nets"][0]
    assert found["layers"][0]["tops"][0]["shape"] == [6, 1, 6, 6]
    assert found["notes"] == ["layer 'data': mean_file cannot be used: none: no such file (expected a .binaryproto)"]


@pytest.mark.parametrize(("model", "parameters"), [("nin", 1_003_656), ("alexnet", 60_965_224), ("lenet", 431_080)])
def test_the_shipped_nets_need_no_data(model: str, parameters: int, capsys: pytest.CaptureFixture[str]) -> None:
    size = {"nin": "3x64x64", "alexnet": "3x256x256", "lenet": "1x28x28"}[model]
    found = json.loads(said(capsys, "summary", str(ROOT / f"models/{model}/train_val.prototxt"), "--image", size, "--json")[0])["nets"][0]
    assert found["parameters"] == parameters
