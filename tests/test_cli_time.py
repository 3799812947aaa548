"""caffelite time: which parts of a solver it leaves out, and which it keeps; what a GPU does while it is asked for layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_harness import said

from caffelite.cli import time as timing
from caffelite.net import Net
from caffelite.schema import net_from_text, pb

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


def test_a_gpu_is_busy_while_a_round_is_asked_for(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a short layer would take as long as the host needs to ask for it."""
    net = Net(net_from_text(NET), phase=pb.TRAIN, backend=cuda, level=1)
    lead, layers, told = timing.Lead(cuda), [timing.LayerTimes(step) for step in net.steps], []
    play, mark = lead._play, cuda.mark
    cuda.fill(lead.filled, 1.0)
    play()
    assert not cuda.to_host(lead.filled).any(), "a play does work"
    monkeypatch.setattr(lead, "_play", lambda: (told.append("play"), play()))
    monkeypatch.setattr(cuda, "mark", lambda: (told.append("mark"), mark())[1])
    timing._time_round(net, layers, cuda, lead)
    assert set(told) == {"mark"}, "nothing is known of the host yet"
    assert lead.host > 0
    told.clear()
    lead.host, lead._seconds = 1e-9, 0.4e-9
    timing._time_round(net, layers, cuda, lead)
    assert told[:1] == ["play"], "at least a play, of a microsecond or more"
    lead.host, lead._seconds = 2.0, 1.0
    told.clear()
    timing._time_round(net, layers, cuda, lead)
    assert told[:4] == ["play"] * 3 + ["mark"]
    assert 0 < lead.host < 2
    assert all(len(layer.forward) == 3 and min(layer.forward) >= 0 for layer in layers)
