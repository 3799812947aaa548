"""The commands on a small data set of PNGs, from conversion to training and scoring."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from caffelite.__main__ import main
from caffelite.cli.specs import is_solver, top_level_names
from caffelite.cli.train import apply_flags, build_parser
from caffelite.schema import solver_from_text

CLASSES, EACH, BATCH = 4, 10, 8

NET = """
name: "tiny"
layer { name: "data" type: "Data" top: "data" top: "label" include { phase: TRAIN }
  transform_param { scale: 0.01 mirror: true }
  data_param { source: "train_db" batch_size: 8 backend: LMDB shuffle: true } }
layer { name: "data" type: "Data" top: "data" top: "label" include { phase: TEST }
  transform_param { scale: 0.01 } data_param { source: "train_db" batch_size: 8 backend: LMDB } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv" convolution_param { num_output: 6 kernel_size: 3 weight_filler { type: "msra" } } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "drop" type: "Dropout" bottom: "conv" top: "conv" }
layer { name: "ip" type: "InnerProduct" bottom: "conv" top: "ip" inner_product_param { num_output: 7 weight_filler { type: "xavier" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }
layer { name: "accuracy" type: "Accuracy" bottom: "ip" bottom: "label" top: "accuracy" include { phase: TEST } }
"""
SOLVER = """
net: "net.prototxt" base_lr: 0.005 lr_policy: "fixed" momentum: 0.9
max_iter: 12 display: 3 test_interval: 6 snapshot: 6 snapshot_prefix: "snaps/tiny" random_seed: 3
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a class of noisy images around each of four colours."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for label in range(CLASSES):
        folder = root / f"class{label}"
        folder.mkdir()
        colour = np.array([40 + 50 * label, 200 - 40 * label, 128])
        for k in range(EACH):
            pixels = np.clip(colour + rng.normal(0, 20, (12, 12, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{k}.png")
    return root


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data converted and a net trained in it."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "net.prototxt").write_text(NET, encoding="utf-8")
    (folder / "solver.prototxt").write_text(SOLVER, encoding="utf-8")
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert main(["convert", "imagefolder", str(images), "train_db"]) == 0
        assert main(["train", "--solver", "solver.prototxt", "--backend", "numpy", "--log", "run.log"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def folder(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The trained folder as the working folder."""
    monkeypatch.chdir(trained)
    monkeypatch.delenv("CAFFELITE_BACKEND", raising=False)
    return trained


def records(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def said(capsys: pytest.CaptureFixture[str], *argv: str, status: int = 0) -> tuple[str, str]:
    """Runs a command; its output and its errors."""
    found = main(list(argv))
    out, err = capsys.readouterr()
    assert found == status, err
    return out, err


# --- convert, mean, dataset ------------------------------------------------------------------------------------------


def test_convert_counts_and_refuses_to_overwrite(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    db = str(tmp_path / "db")
    out, _ = said(capsys, "convert", "imagefolder", str(images), db, "--resize", "6x5", "--gray", "--shuffle", "--threads", "1")
    assert f"{db}: 40 records, sha256 " in out
    assert "40 images in" in out
    _, err = said(capsys, "convert", "imagefolder", str(images), db, status=1)
    assert f"caffelite: error: {db}: it exists already" in err
    said(capsys, "convert", "imagefolder", str(images), db, "--force")
    assert json.loads(said(capsys, "mean", db, "--json")[0])["shape"] == [3, 12, 12]


def test_convert_lists_bad_images(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "src" / "class0"
    source.mkdir(parents=True)
    (source / "good.png").write_bytes((images / "class0" / "0.png").read_bytes())
    (source / "bad.png").write_bytes(b"not an image")
    _, err = said(capsys, "convert", "imagefolder", str(source.parent), str(tmp_path / "db"), status=1)
    assert "1 image(s) cannot be used" in err
    assert "bad.png" in err
    out, err = said(capsys, "convert", "imagefolder", str(source.parent), str(tmp_path / "db"), "--allow-bad")
    assert "1 images in" in out
    assert "1 left out" in out
    assert "warning: left out" in err


def test_convert_says_what_a_size_looks_like(capsys: pytest.CaptureFixture[str]) -> None:
    _, err = said(capsys, "convert", "imagefolder", "a", "b", "--resize", "64", status=2)
    assert "--resize: '64' is not HEIGHTxWIDTH, 64x64 say" in err
    _, err = said(capsys, "convert", "imagefolders", "a", "b", status=2)
    assert "'imagefolders' is not one of" in err
    assert "did you mean imagefolder?" in err


def test_mean_against_the_pixels(folder: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(images.glob("*/*.png"))]).astype(np.float64)
    expected = pixels.mean(axis=(0, 1, 2))[::-1]  # blue first
    out, _ = said(capsys, "mean", "train_db", "mean.binaryproto")
    assert out.splitlines() == ["train_db: 3 x 12 x 12 (channels, height, width), mean image in mean.binaryproto", *[f"mean_value: {v:g}" for v in expected]]
    stored = Path("mean.binaryproto").read_bytes()
    assert struct.unpack("<f", stored[-4:])[0] == pytest.approx(pixels[:, -1, -1, 0].mean(), rel=1e-6)  # the last value: red, lower right


def test_dataset_synth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = said(capsys, "dataset", "synth", str(tmp_path / "d"), "--classes", "2", "--train", "2", "--val", "1", "--size", "32", "--threads", "1")
    assert out == f"{tmp_path}/d: 2 classes, 4 training and 2 validation images\n"
    assert len(list((tmp_path / "d").glob("train/*/images/*.JPEG"))) == 4


# --- summary, check --------------------------------------------------------------------------------------------------


def test_summary_counts_parameters_and_work(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads(said(capsys, "summary", "net.prototxt", "--json")[0])["nets"][0]
    assert summary["parameters"] == 6 * 27 + 6 + 7 * 600 + 7
    assert summary["multiply_adds"] == BATCH * (6 * 27 * 100 + 7 * 600)
    assert summary["outputs"] == ["loss"]
    assert summary["peak_activation_bytes"] < summary["activation_bytes"]
    out, _ = said(capsys, "summary", "net.prototxt", "--phase", "TEST")
    lines = out.splitlines()
    assert lines[0] == "tiny (net.prototxt), phase TEST, float32, batch 8"
    assert any(line.split() == ["ip", "InnerProduct", "8x7", "4,207", "33,600", "0.2", "KB"] for line in lines)
    assert "parameters     4,375 (17.1 KB)" in lines
    out, _ = said(capsys, "summary", "solver.prototxt")
    assert [line for line in out.splitlines() if "phase" in line] == [f"tiny (net.prototxt), phase {p}, float32, batch 8" for p in ("TRAIN", "TEST")]


def test_check_tells_good_files_from_bad(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = said(capsys, "check", "net.prototxt", "solver.prototxt")
    assert "net.prototxt: net 'tiny' in phase TEST: 9 layers, reading train_db\n" in out
    assert "net.prototxt: OK\n" in out
    assert "solver.prototxt: OK\n" in out
    assert err == ""
    gone = tmp_path / "gone.prototxt"
    gone.write_text(NET.replace("train_db", "no_db"), encoding="utf-8")
    typo = tmp_path / "typo.prototxt"
    typo.write_text(NET.replace("num_output: 6", "num_outptu: 6"), encoding="utf-8")
    blocked = tmp_path / "blocked.prototxt"
    blocked.write_text(SOLVER.replace("snaps/tiny", "net.prototxt/tiny") + "solver_mode: GPU", encoding="utf-8")
    out, err = said(capsys, "check", str(gone), str(typo), "net.prototxt", str(blocked), "missing.prototxt", status=2)
    for place in ("5:16", "7:48"):  # each phase has a layer that reads it
        assert f"caffelite: error: {gone}:{place}: layer 'data': no_db: no such database" in err
    assert f"caffelite: error: {typo}:8:" in err
    assert "num_output" in err
    assert f"{blocked}:3:" in err
    assert "is not a writable folder" in err
    assert "missing.prototxt" in err
    verdicts = [line for line in out.splitlines() if line.endswith("OK")]
    assert verdicts == [f"{gone}: not OK", f"{typo}: not OK", "net.prototxt: OK", f"{blocked}: not OK", "missing.prototxt: not OK"]
    assert f"{blocked}: note: solver_mode: GPU" in out


def test_telling_solvers_from_nets(tmp_path: Path) -> None:
    text = 'net: "a" # layer {}\nname: "{ base_lr: 1"\ntrain_state { level: 1 } base_lr: 0.1'
    assert list(top_level_names(text)) == ["net", "name", "train_state", "base_lr"]
    (tmp_path / "s").write_text(text, encoding="utf-8")
    (tmp_path / "n").write_text(NET, encoding="utf-8")
    assert [is_solver(str(tmp_path / name)) for name in ("s", "n", "none")] == [True, False, False]


def test_nets_and_solvers_in_each_others_place(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "error: net.prototxt: this is a net, expected a solver\n" in said(capsys, "train", "--solver", "net.prototxt", status=2)[1]
    assert "error: net.prototxt: this is a net, expected a solver\n" in said(capsys, "time", "--solver", "net.prototxt", status=2)[1]
    for command in (["time"], ["test", "--weights", "w"]):
        assert "error: solver.prototxt: this is a solver, expected a net\n" in said(capsys, *command, "--model", "solver.prototxt", status=2)[1]


# --- train -----------------------------------------------------------------------------------------------------------


def test_training_leaves_snapshots_metrics_and_a_log(folder: Path) -> None:
    assert {p.name for p in Path("snaps").iterdir()} >= {f"tiny_iter_{k}.{e}" for k in (6, 12) for e in ("caffemodel", "solverstate")}
    found = records("snaps/tiny_metrics.jsonl")
    assert [(r["event"], r["iteration"]) for r in found] == [
        *[("start", 0), ("test", 0), ("train", 0), ("train", 3), ("snapshot", 6), ("test", 6), ("train", 6), ("train", 9)],
        *[("snapshot", 12), ("train", 12), ("test", 12), ("end", 12)],
    ]
    assert found[0]["chance"] == 0.25  # four classes in the data, whatever the net could tell apart
    assert found[0]["batch"] == BATCH
    assert found[1]["records"] == CLASSES * EACH
    log = Path("run.log").read_text(encoding="utf-8")
    for text in ("Creating training net from net file: net.prototxt", "conv <- data", "relu -> conv (in-place)", "Top shape: 8 6 10 10 (4800)"):
        assert f"] {text}\n" in log
    assert "] Top shape: (1)\n] " not in log
    assert log.index("] Solver scaffolding done.") < log.index("] Starting Optimization") < log.index("] Solving tiny")
    assert log.count("] Network initialization done.") == 2


def test_training_ends_with_where_things_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = said(capsys, "train", "-solver=solver.prototxt", "-iterations", "3", "--backend", "numpy", "--metrics", "short.jsonl", "--snapshot", "")
    tail = out.splitlines()[-4:]
    assert tail[0].startswith("done at iteration 3 after 0:")
    assert tail[1].startswith("  accuracy  0.")
    assert tail[1].endswith(" (chance 0.2500)")
    assert tail[2] == "  snapshot  snaps/tiny_iter_3.caffemodel"
    assert tail[3] == "  metrics   short.jsonl (curves: caffelite plot short.jsonl)"
    for kind in ("caffemodel", "solverstate"):
        os.remove(f"snaps/tiny_iter_3.{kind}")


def test_resuming_through_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = [Path(f"snaps/tiny_iter_12.{kind}").read_bytes() for kind in ("caffemodel", "solverstate")]
    train = ("train", "--solver", "solver.prototxt", "--backend", "numpy", "--metrics", str(tmp_path / "m.jsonl"))
    said(capsys, *train, "--iterations", "6")
    for kind in ("caffemodel", "solverstate"):
        os.remove(f"snaps/tiny_iter_12.{kind}")
    out, _ = said(capsys, *train, "--snapshot", "auto")
    assert out.startswith("resuming from snaps/tiny_iter_6.solverstate\n")
    assert [Path(f"snaps/tiny_iter_12.{kind}").read_bytes() for kind in ("caffemodel", "solverstate")] == whole
    full = [(r["event"], r["iteration"], r.get("loss"), r.get("outputs")) for r in records("snaps/tiny_metrics.jsonl")]
    resumed = [(r["event"], r["iteration"], r.get("loss"), r.get("outputs")) for r in records(tmp_path / "m.jsonl")]
    assert [r for r in resumed if r[:2] != ("start", 6)] == full


def test_auto_starts_anew_without_a_snapshot(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    solver = tmp_path / "solver.prototxt"
    solver.write_text(SOLVER.replace("snaps/tiny", f"{tmp_path}/new"), encoding="utf-8")
    out, _ = said(capsys, "train", "--solver", str(solver), "--backend", "numpy", "--iterations", "1", "--snapshot", "auto")
    assert out.startswith(f"no snapshot {tmp_path}/new_iter_*.solverstate yet: starting anew\n")


def test_fine_tuning_starts_from_the_weights(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = records("snaps/tiny_metrics.jsonl")[-2]["outputs"]
    solver = tmp_path / "solver.prototxt"
    solver.write_text(SOLVER.replace("snaps/tiny", f"{tmp_path}/new"), encoding="utf-8")
    said(capsys, "train", "--solver", str(solver), "--backend", "numpy", "--iterations", "1", "--weights", "snaps/tiny_iter_12.caffemodel")
    assert records(tmp_path / "new_metrics.jsonl")[1]["outputs"] == last


def test_auto_keeps_the_solvers_weights_where_there_is_no_snapshot_yet(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = records("snaps/tiny_metrics.jsonl")[-2]["outputs"]
    solver = tmp_path / "solver.prototxt"
    text = SOLVER.replace("snaps/tiny", f"{tmp_path}/new") + 'weights: "snaps/tiny_iter_12.caffemodel"'
    solver.write_text(text, encoding="utf-8")
    said(capsys, "train", "--solver", str(solver), "--backend", "numpy", "--iterations", "1", "--snapshot", "auto")
    assert records(tmp_path / "new_metrics.jsonl")[1]["outputs"] == last


def test_flags_write_into_the_solver(tmp_path: Path) -> None:
    spec = solver_from_text('net: "n" weights: "old.caffemodel" max_iter: 5 train_state { level: 3 stage: "a" }')
    parser = build_parser("train")
    apply_flags(spec, parser.parse(["--solver", "s", "--weights", "b.caffemodel, c.caffemodel", "--iterations", "9", "--level", "2", "--stage", "x,y"]))
    assert list(spec.param.weights) == ["b.caffemodel", "c.caffemodel"]
    assert (spec.param.max_iter, spec.param.train_state.level, list(spec.param.train_state.stage)) == (9, 2, ["a", "x", "y"])
    apply_flags(spec, parser.parse(["--solver", "s", "--snapshot", "s.solverstate"]))
    assert (list(spec.param.weights), spec.param.max_iter, spec.param.train_state.level) == ([], 9, 2)


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--snapshot", "a.solverstate", "--weights", "b.caffemodel"], 2, "--snapshot and --weights exclude each other"),
        (["--gpu", "0,1"], 2, "--gpu takes the number of one GPU, found '0,1'\n  caffelite device-query lists them"),
        (["--gpu", "0", "--backend", "onednn"], 2, "--gpu 0 and --backend onednn exclude each other"),
        (["--backend", "onednm"], 2, "unknown backend 'onednm'\n  did you mean 'onednn'? known ones: auto, numpy, onednn, cuda"),
        (["--weights", "none.caffemodel"], 1, "none.caffemodel"),
        (["--snapshot", "none.solverstate"], 1, "none.solverstate"),
        (["--log", "snaps"], 1, "cannot write log snaps: Is a directory"),
    ],
)
def test_what_train_refuses(folder: Path, flags: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = said(capsys, "train", "--solver", "solver.prototxt", "--metrics", "refused.jsonl", *flags, status=status)
    assert message in err
    assert "Traceback" not in err


def test_solver_mode_gpu_needs_a_decision(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)  # as where it is not installed
    monkeypatch.delenv("CAFFELITE_CUDA_DRIVER", raising=False)
    solver = tmp_path / "gpu.prototxt"
    solver.write_text(SOLVER.replace("snaps/tiny", f"{tmp_path}/gpu") + "solver_mode: GPU\n", encoding="utf-8")
    _, err = said(capsys, "train", "--solver", str(solver), status=1)
    assert err.startswith(f"caffelite: error: {solver}:4:1: solver_mode: GPU, but the cuda backend needs CuPy, which does not load: ")
    assert err.endswith("(or [cuda12]); or pass --backend onednn (or numpy), which wins over solver_mode\n")
    said(capsys, "train", "--solver", str(solver), "--iterations", "1", "--backend", "numpy")
    monkeypatch.setenv("CAFFELITE_BACKEND", "nmpy")
    _, err = said(capsys, "train", "--solver", str(solver), status=2)
    assert "CAFFELITE_BACKEND is 'nmpy' in the environment\n  did you mean 'numpy'? known ones: auto, numpy, onednn, cuda\n" in err


def test_control_c_leaves_a_snapshot_and_status_0(folder: Path, tmp_path: Path) -> None:
    solver = tmp_path / "long.prototxt"
    solver.write_text(SOLVER.replace("snaps/tiny", f"{tmp_path}/long").replace("max_iter: 12", "max_iter: 1000000"), encoding="utf-8")
    command = [sys.executable, "-m", "caffelite", "train", "--solver", str(solver), "--backend", "numpy"]
    root = str(Path(__file__).parent.parent)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root}) as process:
        assert process.stdout
        assert process.stderr
        while "iteration 3/" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert "stopped at iteration " in out
    assert "with --snapshot auto goes on from here" in out
    end = records(tmp_path / "long_metrics.jsonl")[-1]
    assert (end["event"], end["stopped"]) == ("end", True)
    assert (tmp_path / f"long_iter_{end['iteration']}.solverstate").exists()


# --- test, time ------------------------------------------------------------------------------------------------------

MODEL = ("--model", "net.prototxt", "--backend", "numpy")


def test_scoring_agrees_with_the_training_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = records("snaps/tiny_metrics.jsonl")[-2]["outputs"]
    found = json.loads(said(capsys, "test", *MODEL, "--weights", "snaps/tiny_iter_12.caffemodel", "--json")[0])
    assert found["outputs"] == pytest.approx(last, rel=1e-6)
    assert (found["records"], found["iterations"], found["chance"]) == (40, 5, {"accuracy": 0.25})
    out, _ = said(capsys, "test", *MODEL, "--weights", "snaps/tiny_iter_12.caffemodel", "-iterations=2", "-v")
    lines = out.splitlines()
    assert lines[0] == "Running for 2 iterations."
    assert [line.split(" = ")[0] for line in lines[1:5]] == ["Batch 0, accuracy", "Batch 0, loss", "Batch 1, accuracy", "Batch 1, loss"]
    batch = [float(line.split(" = ")[1]) for line in lines[1:5]]
    assert float(lines[5].removeprefix("Loss: ")) == pytest.approx((batch[1] + batch[3]) / 2, rel=1e-5)
    assert float(lines[6].removeprefix("accuracy = ")) == pytest.approx((batch[0] + batch[2]) / 2, rel=1e-5)
    assert lines[7] == f"loss = {lines[5][6:]} (* 1 = {lines[5][6:]} loss)"


def test_a_net_without_a_database_needs_iterations(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deploy = tmp_path / "deploy.prototxt"
    start = 'layer { name: "in" type: "Input" top: "data" input_param { shape { dim: 8 dim: 3 dim: 12 dim: 12 } } }'
    deploy.write_text(start + NET[NET.index('layer { name: "conv"') : NET.index('layer { name: "loss"')], encoding="utf-8")
    test = ("test", "--model", str(deploy), "--backend", "numpy", "--weights", "snaps/tiny_iter_12.caffemodel")
    _, err = said(capsys, *test, status=2)
    assert "reads no database, so its records cannot be counted\n  give --iterations: the number of batches to score" in err
    found = json.loads(said(capsys, *test, "--iterations", "1", "--json")[0])
    assert (len(found["outputs"]["ip"]), found["records"]) == (8 * 7, 0)


def test_time_of_layers_and_steps(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capsys, "time", *MODEL, "--iterations", "2", "--json")[0])
    assert [layer["name"] for layer in found["layers"]] == ["data", "conv", "relu", "drop", "ip", "loss"]
    conv = found["layers"][1]
    work = 2 * BATCH * 6 * 27 * 100 / 1e9
    assert conv["forward_gflops"] == pytest.approx(work / conv["forward_ms"] * 1e3)
    assert conv["backward_gflops"] == pytest.approx(work / conv["backward_ms"] * 1e3)  # the weights' gradient only: the data needs none
    assert found["layers"][4]["backward_gflops"] == pytest.approx(2 * 2 * BATCH * 4200 / found["layers"][4]["backward_ms"] / 1e6)
    out, _ = said(capsys, "time", *MODEL, "--iterations", "1", "--phase", "TEST")
    assert out.splitlines()[0] == "tiny, phase TEST, numpy, float32, batch 8, medians of 1 rounds"
    assert "backward 0.000 ms" in out
    before = sorted(os.listdir("snaps"))
    found = json.loads(said(capsys, "time", "--solver", "solver.prototxt", "--backend", "numpy", "--iterations", "3", "--json")[0])
    assert found["step_ms_min"] <= found["step_ms"] <= found["step_ms_max"]
    assert found["images_per_s"] == pytest.approx(BATCH / found["step_ms"] * 1e3)
    assert found["peak_rss_mb"] > 10
    assert sorted(os.listdir("snaps")) == before


def test_time_needs_a_model_or_a_solver(capsys: pytest.CaptureFixture[str]) -> None:
    assert "one of the arguments --model --solver is required" in said(capsys, "time", status=2)[1]
    assert "not allowed with argument --model" in said(capsys, "time", "--model", "a", "--solver", "b", status=2)[1]


def test_device_query(capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(said(capsys, "device_query", "--json")[0])
    assert facts["cpu"]["cores"] == os.cpu_count()
    assert facts["backends"]["numpy"]["loads"]
    assert facts["backends"]["numpy"]["precisions"]["float32"] == "fast"
    assert facts["packages"]["numpy"] == np.__version__
    assert facts["gpu"]["devices"] or facts["gpu"]["why"]
    out, _ = said(capsys, "device-query")
    assert "\nnumpy     loads\n" in out
    assert facts["cpu"]["model"] in out
