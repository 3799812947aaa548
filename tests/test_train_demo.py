"""tools/train_demo.py, which `make train` runs: how its steps fail and stop."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
NET = """name: "small"
layer { name: "data" type: "DummyData" top: "data" dummy_data_param { shape { dim: 4 dim: 3 } data_filler { type: "gaussian" } } }
layer { name: "label" type: "DummyData" top: "label" dummy_data_param { shape { dim: 4 } } }
layer { name: "ip" type: "InnerProduct" bottom: "data" top: "ip" inner_product_param { num_output: 2 } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }
"""
SOLVER = 'net: "net.prototxt" base_lr: 0.01 lr_policy: "fixed" max_iter: 100000000 display: 1 snapshot_prefix: "small"\n'
STEP = """import sys
sys.path.insert(0, "tools")
import train_demo, os
os.chdir(sys.argv[1])
try:
    train_demo.caffelite("train", "--solver", "solver.prototxt", "--backend", "numpy")
except train_demo.Stopped as stopped:
    print("Stopped", int(stopped.args[0]))
"""


@pytest.fixture
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo", ROOT / "tools" / "train_demo.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_lets_the_training_write_its_snapshot(name: str, tmp_path: Path) -> None:
    (tmp_path / "net.prototxt").write_text(NET)
    (tmp_path / "solver.prototxt").write_text(SOLVER)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", STEP, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT, start_new_session=True) as process:
        assert process.stdout
        while "iteration 3/" not in process.stdout.readline():
            assert process.poll() is None
        if name == "SIGINT":
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        else:
            process.terminate()
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "stopped at iteration " in out
    assert out.endswith(f"Stopped {int(signal.Signals[name])}\n")
    assert len(list(tmp_path.glob("small_iter_*.solverstate"))) == 1


def test_a_failing_command_ends_the_demo_with_its_status(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wnids.txt").write_text("n1\n")  # and nothing else of the layout
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_demo.py", "--data", str(tmp_path)])
    assert demo.main() == 1
    out, err = capfd.readouterr()
    assert "$ caffelite convert tiny-imagenet" in out
    assert err.splitlines()[-1] == "train_demo: the command above failed (exit status 1)"


def test_images_in_another_layout_are_refused(demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["train_demo.py", "--data", str(tmp_path)])
    assert demo.main() == 2
    assert capsys.readouterr().err == f"train_demo: {tmp_path}: no folder in Tiny ImageNet's layout (it has no wnids.txt)\n"
