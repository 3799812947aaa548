"""tools/train_demo.py, which `make train` runs: what it makes of other data, and what it says at the end."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from caffelite.graph import build_graph
from caffelite.schema import pb, read_net, read_solver

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool, with a copy of the models and solvers as the working folder."""
    for name in ("models", "solvers"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("train_demo", ROOT / "tools" / "train_demo.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def databases(name: str, classes: int) -> Path:
    folder = Path("data") / name
    folder.mkdir(parents=True)
    (folder / "labels.txt").write_text("".join(f"n{i}\n" for i in range(classes)))
    return folder


def test_the_drawn_data_have_their_own_solver(demo: ModuleType) -> None:
    assert demo.fitted_solver(databases("synth", 20)) == Path("solvers/nin_quick.prototxt")


def test_other_data_get_a_net_with_an_output_for_each_class(demo: ModuleType) -> None:
    solver = read_solver(demo.fitted_solver(databases("pets", 37))).param
    assert solver.snapshot_prefix == "runs/pets/nin_quick"
    net = read_net(solver.net)
    sources = [layer.data_param.source for layer in net.param.layer if layer.type == "Data"]
    assert sources == ["data/pets/train_lmdb", "data/pets/val_lmdb"]

    def images(layer: object) -> None:
        if hasattr(layer, "source"):
            layer.source.assume((3, 64, 64))

    graph = build_graph(net, phase=pb.TEST, prepare=images)
    assert next(node for node in graph.nodes if node.layer.type == "Accuracy").bottoms[0].shape == (50, 37, 1, 1)


def test_the_closing_lines_show_the_accuracy_next_to_chance(demo: ModuleType) -> None:
    param = read_solver("solvers/nin_quick.prototxt").param
    prefix = Path(param.snapshot_prefix)
    prefix.parent.mkdir(parents=True)
    records = [{"event": "start", "chance": 0.05}, *({"event": "test", "outputs": {"accuracy": value}} for value in (0.1, 0.625))]
    Path(f"{prefix}_metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = demo.closing_lines(Path("solvers/nin_quick.prototxt"), Path("curves.png"))
    assert [line.split(None, 1)[1] for line in lines] == [
        "0.625 (chance 0.050)",
        f"{prefix}_iter_{param.max_iter}.caffemodel",
        f"{prefix}_metrics.jsonl",
        "curves.png",
    ]


def test_a_folder_of_another_layout_is_refused(demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["train_demo.py", "--data", str(tmp_path)])
    assert demo.main() == 2
    assert capsys.readouterr().err.startswith(f"train_demo: {tmp_path}: no folder in Tiny ImageNet's layout (it has no wnids.txt)\n  docs/getting-started.md ")
    monkeypatch.setattr(sys, "argv", ["train_demo.py", "--data", str(tmp_path / "none")])
    assert demo.main() == 2
    assert capsys.readouterr().err.startswith(f"train_demo: {tmp_path}/none: no such folder\n")
