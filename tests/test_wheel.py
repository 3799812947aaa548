"""The wheel holds all that is needed: installed into an environment of its own, it trains in an empty directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NET = """
layer { name: "data" type: "Data" top: "data" top: "label" include { phase: TRAIN } transform_param { crop_size: 12 mirror: true }
        data_param { source: "db/train_lmdb" backend: LMDB batch_size: 6 shuffle: true } }
layer { name: "data" type: "Data" top: "data" top: "label" include { phase: TEST } transform_param { crop_size: 12 }
        data_param { source: "db/val_lmdb" backend: LMDB batch_size: 4 } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv" convolution_param { num_output: 4 kernel_size: 3 weight_filler { type: "msra" } } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "score" type: "InnerProduct" bottom: "conv" top: "score" inner_product_param { num_output: 3 weight_filler { type: "xavier" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "score" bottom: "label" top: "loss" }
layer { name: "accuracy" type: "Accuracy" bottom: "score" bottom: "label" top: "accuracy" include { phase: TEST } }
"""
SOLVER = 'net: "net.prototxt" base_lr: 1e-6 lr_policy: "fixed" max_iter: 100 snapshot_prefix: "out/small" random_seed: 1 solver_mode: CPU'


def run(*words: str | Path, cwd: Path) -> str:
    """The output of a command that has to succeed, run without this process's Python settings."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "CAFFELITE"))}
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the files that packaging may use."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "caffelite", source / "caffelite", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_every_file_and_nothing_else(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    tree = {str(path.relative_to(ROOT)) for path in (ROOT / "caffelite").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert packed == tree
    assert {"caffelite/caffelite_pb2.py", "caffelite/py.typed"} <= packed
    assert "Requires-Python: >=3.10" in metadata
    assert "License-Expression: MIT" in metadata


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts folder of a new environment with the wheel. It sees this environment's other packages through a .pth line,
    which does not read their own .pth files: an editable caffelite stays out."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    scripts = folder / "bin"
    site = run(scripts / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    run(sys.executable, "-m", "pip", "--python", scripts / "python", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    (Path(site) / "dependencies.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}) + "\n")
    return scripts


def test_wheel_trains_in_an_empty_directory(environment: Path, tmp_path: Path) -> None:
    place = run(environment / "python", "-c", "import caffelite; print(caffelite.__file__)", cwd=tmp_path).strip()
    assert Path(place).is_relative_to(environment.parent)
    caffelite = environment / "caffelite"
    run(caffelite, "dataset", "synth", "images", "--classes", "3", "--train", "6", "--val", "3", "--size", "16", cwd=tmp_path)
    run(caffelite, "convert", "tiny-imagenet", "images", "db", cwd=tmp_path)
    (tmp_path / "net.prototxt").write_text(NET)
    (tmp_path / "solver.prototxt").write_text(SOLVER)
    told = run(caffelite, "train", "--solver", "solver.prototxt", "--iterations", "5", cwd=tmp_path)
    assert "done at iteration 5" in told
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["small_iter_5.caffemodel", "small_iter_5.solverstate", "small_metrics.jsonl"]
    scored = run(caffelite, "test", "--model", "net.prototxt", "--weights", "out/small_iter_5.caffemodel", cwd=tmp_path)
    assert "accuracy" in scored
