"""Training on CUDA kernels with images that travel as bytes, or lie in the GPU's memory: every input and every weight is the same as with
images transformed on the host, tests of whole databases and resumed runs included."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import numbered, raw, write_lmdb
from solver_harness import IMAGES, Recorder, make_solver

from caffelite.backends.contract import Backend
from caffelite.layers.data import DataLayer
from caffelite.solver import loop
from caffelite.solver.loop import Solver
from caffelite.weights import read_weights

# Rate, momentum, several parts an iteration, and tests of the whole database, whose last batch of 20 has a net of its own.
SETTINGS = 'base_lr: 0.05 lr_policy: "fixed" momentum: 0.9 iter_size: 2 max_iter: 6 test_interval: 3 snapshot_after_train: false snapshot_prefix: "s" '
WAYS = ("host", "raw", "cached")


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bytes]]:
    """The phase's number and the bytes of every batch, images and labels, that a net reads from now on."""
    seen: list[tuple[str, bytes]] = []
    feed = DataLayer.feed

    def watched(layer: DataLayer, ops: Backend, tops: Any) -> None:
        feed(layer, ops, tops)
        seen.append((str(layer.phase), b"".join(ops.to_host(top.data).tobytes() for top in tops)))

    monkeypatch.setattr(DataLayer, "feed", watched)
    return seen


def solver_for(way: str, cuda: Any, monkeypatch: pytest.MonkeyPatch, precision: str = "float32", heard: Recorder | None = None) -> Solver:
    monkeypatch.setattr(type(cuda), "raw_images", way != "host")
    monkeypatch.setattr(loop, "LOOK_SECONDS", -1)  # so that every loss is known at once
    net = IMAGES.replace("backend: LMDB", "backend: LMDB cache: DEVICE") if way == "cached" else IMAGES
    return make_solver(SETTINGS, net, cuda, precision=precision, listeners=[heard or Recorder()])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_inputs_scores_and_weights_are_the_same(cuda: Any, monkeypatch: pytest.MonkeyPatch, inputs: list, precision: str) -> None:
    results = []
    for way in WAYS:
        heard = Recorder()
        solver = solver_for(way, cuda, monkeypatch, precision, heard)
        solver.solve()
        results.append((list(inputs), heard.named("iteration", "test"), cuda.to_host(solver.net.arena.master).tobytes()))
        assert [layer.source._raw is not None for layer in solver.net.data_layers] == [way != "host"]
        assert len([text for text in heard.messages() if text.startswith("cache: DEVICE holds 2.3 MB for the 200 images (3x64x64)")]) == (way == "cached")
        assert len(inputs) == 12 + 3 * 7  # 6 iterations of 2 parts; before, between and after them 200 records in batches of 30
        inputs.clear()
        solver.close()
    host, raw_images, cached = results
    assert raw_images == host
    assert cached == host


@pytest.mark.parametrize("way", ["raw", "cached"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, cuda: Any, monkeypatch: pytest.MonkeyPatch, inputs: list, way: str) -> None:
    """The host's run goes through; this way's is resumed from its snapshot, in the middle of an epoch, with batches read ahead."""
    monkeypatch.chdir(tmp_path)
    whole = solver_for("host", cuda, monkeypatch)
    whole.step(5)
    want = list(inputs)
    inputs.clear()
    first = solver_for(way, cuda, monkeypatch)
    first.step(3)
    state = first.snapshot()
    first.close()
    second = solver_for(way, cuda, monkeypatch)
    second.restore(state)
    second.step(2)
    assert [batch for batch in inputs if batch[0] == "0"] == [batch for batch in want if batch[0] == "0"]
    np.testing.assert_array_equal(cuda.to_host(second.net.arena.master), cuda.to_host(whole.net.arena.master))
    for solver in (whole, second):
        solver.close()


NET = """layer {{ name: "data" type: "Data" top: "data" top: "label" transform_param {{ crop_size: 6 mirror: true }}
  data_param {{ source: "{}" backend: LMDB batch_size: 4 shuffle: true {} }} }}
layer {{ name: "ip" type: "InnerProduct" bottom: "data" top: "ip" inner_product_param {{ num_output: 10 weight_filler {{ type: "xavier" }} }} }}
layer {{ name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }}
"""


def train(folder: Path, net: str, *flags: str) -> subprocess.CompletedProcess[str]:
    (folder / "net.prototxt").write_text(net)
    text = 'net: "net.prototxt" base_lr: 0.0001 lr_policy: "fixed" max_iter: 4 display: 2 random_seed: 3 snapshot_prefix: "s"'
    (folder / "solver.prototxt").write_text(text)
    command = [sys.executable, "-m", "caffelite", "train", "--solver", "solver.prototxt", *flags]
    return subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}, capture_output=True, text=True, timeout=300)


def test_the_command_trains_with_and_without_a_cache_to_the_same_bytes(tmp_path: Path, cuda: Any) -> None:
    path, _ = numbered(tmp_path / "db", 10)
    plain = train(tmp_path, NET.format(path, ""), "--gpu", "0")
    assert plain.returncode == 0, plain.stderr
    weights = (tmp_path / "s_iter_4.caffemodel").read_bytes()
    cached = train(tmp_path, NET.format(path, "cache: DEVICE"), "--gpu", "0")
    assert cached.returncode == 0, cached.stderr
    said = f"cache: DEVICE holds 0.0 MB for the 10 images (3x8x10) of {path} in the GPU's memory"
    assert (said in plain.stdout + plain.stderr, said in cached.stdout + cached.stderr) == (False, True)
    (tmp_path / "plain.caffemodel").write_bytes(weights)
    first, second = (read_weights(tmp_path / name) for name in ("plain.caffemodel", "s_iter_4.caffemodel"))
    assert [list(blob.data) for layer in first.layer for blob in layer.blobs] == [list(blob.data) for layer in second.layer for blob in layer.blobs]


def test_what_the_command_says_of_a_bad_record(tmp_path: Path, cuda: Any) -> None:
    good = raw(np.zeros((3, 8, 10), np.uint8), 1)
    path = write_lmdb(tmp_path / "db", [good, good, b"garbage"])
    for extra in ("", "cache: DEVICE"):
        run = train(tmp_path, NET.format(path, extra), "--gpu", "0")
        assert run.returncode == 1
        assert "layer 'data': record '00000002': " in run.stderr
        assert "Traceback" not in run.stderr
    on_cpu = train(tmp_path, NET.format(path, "cache: DEVICE"), "--backend", "numpy")
    assert on_cpu.returncode == 2
    assert "net.prototxt:2:" in on_cpu.stderr
    assert "cache: DEVICE keeps images in a GPU's memory, and this runs on a CPU\n  train with --gpu 0, or remove cache: DEVICE" in on_cpu.stderr
