"""caffelite time --solver: which parts of a solver it leaves out, and which it keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_harness import said

NET = """name: "leveled"
layer { name: "data" type: "DummyData" top: "data" top: "label" include { min_level: 1 }
  dummy_data_param { shape { dim: 6 dim: 3 } shape { dim: 6 } data_filler { type: "gaussian" } data_filler { type: "constant" } } }
layer { name: "data" type: "DummyData" top: "data" top: "label" include { max_level: 0 }
  dummy_data_param { shape { dim: 4 dim: 3 } shape { dim: 4 } data_filler { type: "gaussian" } data_filler { type: "constant" } } }
layer { name: "ip" type: "InnerProduct" bottom: "data" top: "ip" inner_product_param { num_output: 2 } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }
layer { name: "accuracy" type: "Accuracy" bottom: "ip" bottom: "label" top: "accuracy" include { phase: TEST } }
"""
SOLVER = """net: "net.prototxt" base_lr: 0.1 lr_policy: "fixed" max_iter: 3 train_state { level: 1 }
test_iter: 1 test_interval: 1 snapshot: 1 snapshot_prefix: "out" snapshot_best: "accuracy"
"""


@pytest.fixture
def timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    (tmp_path / "net.prototxt").write_text(NET)
    (tmp_path / "solver.prototxt").write_text(SOLVER)
    monkeypatch.chdir(tmp_path)
    return ("time", "--solver", "solver.prototxt", "--backend", "numpy", "--iterations", "2", "--json")


def test_tests_and_snapshots_are_left_out(timed: tuple[str, ...], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert json.loads(said(capsys, *timed)[0])["iterations"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.prototxt", "solver.prototxt"]


def test_the_solvers_level_holds_unless_the_flag_gives_another(timed: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(said(capsys, *timed)[0])["batch"] == 6
    assert json.loads(said(capsys, *timed, "--level=-1")[0])["batch"] == 4


def test_a_device_that_runs_ahead_is_timed_over_several_steps(cuda: object, timed: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    there = ("time", "--solver", "solver.prototxt", "--backend", "cuda", "--iterations", "20")
    assert json.loads(said(capsys, *there, "--json")[0])["steps_at_once"] == 2
    assert "(median of runs of 2 steps;" in said(capsys, *there)[0]
    assert json.loads(said(capsys, *timed)[0])["steps_at_once"] == 1
