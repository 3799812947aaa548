"""caffelite check on solvers whose fields do not go with their nets."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cli_harness import said

NET = """name: "small"
layer { name: "data" type: "DummyData" top: "data" top: "label" dummy_data_param { shape { dim: 4 dim: 3 } shape { dim: 4 } } }
layer { name: "ip" type: "InnerProduct" bottom: "data" top: "ip" inner_product_param { num_output: 2 } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }
layer { name: "accuracy" type: "Accuracy" bottom: "ip" bottom: "label" top: "accuracy" include { phase: TEST } }
"""
SOLVER = 'net: "net.prototxt" base_lr: 0.1 lr_policy: "fixed" snapshot_prefix: "out" '


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.prototxt").write_text(NET)


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        ('snapshot_best: "accuracy"', "add a test net: test_interval, and TEST layers or test_net"),
        ('snapshot_best: "acuracy" test_interval: 1 test_iter: 1', "its outputs: accuracy, loss"),
    ],
)
def test_snapshot_best_must_be_an_output_of_a_test_net(fields: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("s.prototxt").write_text(f"{SOLVER}max_iter: 2\n{fields}")
    for command in (("check", "s.prototxt"), ("train", "--solver", "s.prototxt", "--backend", "numpy")):
        err = said(capsys, *command, status=2)[1]
        assert err.startswith("caffelite: error: s.prototxt:2:1: snapshot_best names 'a")
        assert hint in err


def test_a_best_output_that_is_there_and_a_missing_max_iter(capsys: pytest.CaptureFixture[str]) -> None:
    Path("s.prototxt").write_text(SOLVER + 'snapshot_best: "accuracy" test_interval: 1 test_iter: 1')
    out, err = said(capsys, "check", "s.prototxt")
    assert (out.splitlines()[0], err) == ("s.prototxt: note: it has no max_iter; train it with --iterations", "")
    assert "error: s.prototxt:1:1: max_iter is missing or 0" in said(capsys, "train", "--solver", "s.prototxt", "--backend", "numpy", status=2)[1]
    said(capsys, "train", "--solver", "s.prototxt", "--backend", "numpy", "--iterations", "1")


def test_a_solver_whose_net_learns_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    frozen = NET.replace("{ num_output: 2 }", "{ num_output: 2 } param { lr_mult: 0 } param { lr_mult: 0 }")
    for text in (NET.partition('layer { name: "loss"')[0], frozen):
        Path("net.prototxt").write_text(text)
        Path("s.prototxt").write_text(SOLVER + "max_iter: 2")
        for command in (("check", "s.prototxt"), ("train", "--solver", "s.prototxt", "--backend", "numpy")):
            err = said(capsys, *command, status=2)[1]
            assert "net.prototxt:1:1: no parameter of the train net learns from a loss\n  check the loss layer, loss_weight and lr_mult\n" in err
        said(capsys, "check", "net.prototxt")  # it may be meant for testing


def test_hdf5_snapshots_need_h5py(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)  # as where it is not installed
    Path("s.prototxt").write_text(SOLVER + "max_iter: 2 snapshot_format: HDF5")
    for command in (("check", "s.prototxt"), ("train", "--solver", "s.prototxt", "--backend", "numpy")):
        assert "HDF5 files need h5py, which is not installed\n" in said(capsys, *command, status=1)[1]
    Path("s.prototxt").write_text(SOLVER + "max_iter: 2 snapshot_format: HDF5 snapshot_after_train: false")
    said(capsys, "check", "s.prototxt")


def test_faults_come_with_a_traceback_where_the_environment_asks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("net.prototxt").write_text(NET.replace("InnerProduct", "Inner"))
    assert "Traceback" not in said(capsys, "check", "net.prototxt", "none.prototxt", status=2)[1]
    monkeypatch.setenv("CAFFELITE_DEBUG", "1")
    err = said(capsys, "check", "net.prototxt", "none.prototxt", status=2)[1]
    assert err.count("\ncaffelite.errors.SpecError: ") == 3  # in both phases, and of the file that is not there
