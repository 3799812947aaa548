"""The scripts that measure a GPU, as far as they go without one: what they run, in which order, and what their tables say."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from caffelite import backends
from caffelite.net import Net
from caffelite.schema import net_from_text, pb, to_text

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """script(name) imports a file of benchmarks/."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


# --- step times ------------------------------------------------------------------------------------------------------------


def row(script, mode: str, steps: list[float], peak: float | None = None):
    found = script("gpu_step").Candidate("nin", 128, mode)
    found.rounds = [{"step_ms": step, **({"peak_mb": peak} if peak else {})} for step in steps]
    return found


def test_table_of_steps(script) -> None:
    rows = [row(script, "bfloat16", [2.0, 9.0, 1.0], 500), row(script, "float32", [8.0]), row(script, "eager-bfloat16", [3.0, 3.0, 4.0], 2000)]
    rows += [row(script, "wgmma-bfloat16", [1.5], 500), row(script, "compile-bfloat16", [1.6], 1000), row(script, "compile-tf32", [])]
    rows[-1].failed = "no answer within 180 s"
    assert script("gpu_step").text(rows).splitlines()[2:] == [
        "| nin | 128 | caffelite | bfloat16 | 64,000 | 2.000 | 1.50 | 0.80 | 500 | 0.25 | 0.50 |",
        "| nin | 128 | caffelite | float32 | 16,000 | 8.000 |  |  |  |  |  |",
        "| nin | 128 | PyTorch eager | bfloat16 | 42,667 | 3.000 | 1.00 | 0.53 | 2,000 | 1.00 | 2.00 |",
        "| nin | 128 | caffelite wgmma | bfloat16 | 85,333 | 1.500 | 2.00 | 1.07 | 500 | 0.25 | 0.50 |",
        "| nin | 128 | PyTorch compiled | bfloat16 | 80,000 | 1.600 | 1.88 | 1.00 | 1,000 | 0.50 | 1.00 |",
        "",
        "Not measured, or cut short:",
        "- nin:128 compile-tf32: no answer within 180 s",
    ]


def test_compiled_modes_run_last_beside_ours(script) -> None:
    step = script("gpu_step")
    words = ["--nets", "lenet:2", "nin:128", "--modes", "tf32", "float32", "eager-tf32", "compile-tf32"]
    groups = step.groups(step.arguments(words))
    assert [[found.name.split()[1] for found in group] for group in groups] == [["tf32", "float32", "eager-tf32"]] * 2 + [["tf32", "compile-tf32"]] * 2
    assert [group[0].net for group in groups] == ["lenet", "nin", "lenet", "nin"]
    assert groups[0][0] is groups[2][0]
    (group,) = step.groups(step.arguments(["--nets", "lenet:2", "--modes", "tf32", "compile-tf32"]))
    assert [found.mode for found in group] == ["tf32", "compile-tf32"]
    assert step.arguments(["--dry-run", "--nets", "nin:128"]).nets == [("lenet", 2)]


def test_ours_in_every_way_run_beside_the_compiled_ones(script) -> None:
    step = script("gpu_step")
    words = ["--nets", "lenet:2", "--modes", "bfloat16", "wgmma-bfloat16", "tma-bfloat16", "tf32", "eager-bfloat16", "compile-bfloat16"]
    *_, beside = step.groups(step.arguments(words))
    assert [found.mode for found in beside] == ["bfloat16", "wgmma-bfloat16", "tma-bfloat16", "compile-bfloat16"]


def test_a_mode_finds_its_choice_in_the_environment(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = script("gpu_step")
    told = "import os; input(); print('result {\"step_ms\": %d}' % (os.environ.get('CAFFELITE_CUDA_PRODUCTS') == 'wgmma'), flush=True); input()"
    monkeypatch.setattr(step.Candidate, "command", lambda self, device: [sys.executable, "-c", told])
    asked, ask = [], step.Process.ask
    monkeypatch.setattr(step.Process, "ask", lambda self, line, seconds: asked.append(ask(self, line, seconds)) or asked[-1])
    rows = [step.Candidate("nin", 128, mode) for mode in ("bfloat16", "wgmma-bfloat16")]
    step.run_group(rows, step.arguments(["--rounds", "0"]), step.Report(tmp_path, rows), time.perf_counter() + 100)
    assert asked == [{"step_ms": 0}, {"step_ms": 1}]
    assert [row.command("cuda")[0] for row in rows] == [sys.executable] * 2


@pytest.mark.parametrize("word", ["vgg:128", "nin", "nin:0", "nin:x"])
def test_nets_that_are_none(script, word: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{word}' is not NET:BATCH with a NET of nin_crop48, nin, alexnet"):
        script("gpu_step").net_and_batch(word)


WORKER = """
import sys
input(); print("noise"); print('result {"first_s": 1}', flush=True)
for line in sys.stdin:
    if MODE == "crash": sys.exit(7)
    if MODE == "hang": import time; time.sleep(60)
    print('result {"step_ms": %s}' % line.strip(), flush=True)
"""


@pytest.mark.parametrize(("mode", "failed"), [("good", ""), ("crash", "ended with exit status 7"), ("hang", "no answer within 1 s")])
def test_a_mode_that_fails_loses_no_other(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, failed: str) -> None:
    step = script("gpu_step")
    monkeypatch.setattr(step, "ENDING_SECONDS", 0.1)
    commands = {"tf32": WORKER.replace("MODE", f"'{mode}'"), "eager-tf32": WORKER.replace("MODE", "'good'")}
    monkeypatch.setattr(step.Candidate, "command", lambda self, device: [sys.executable, "-c", commands[self.mode]])
    rows = [step.Candidate("nin", 128, name) for name in commands]
    args = step.arguments(["--rounds", "2", "--seconds", "0.25"])
    report = step.Report(tmp_path, rows)
    args.start_seconds = 60
    if mode == "hang":
        ask = step.Process.ask
        monkeypatch.setattr(step.Process, "ask", lambda self, line, seconds: ask(self, line, seconds if line == "start" else 1))
    step.run_group(rows, args, report, time.perf_counter() + 100)
    assert [found.failed for found in rows] == [failed, ""]
    assert [len(found.rounds) for found in rows] == [0 if failed else 2, 2]
    assert rows[1].rounds[0] == {"step_ms": 0.25}
    assert len((tmp_path / "steps.jsonl").read_text().splitlines()) == (2 if failed else 4)
    assert json.loads((tmp_path / "steps.json").read_text())[0]["failed"] == failed


# --- nets ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["nin_crop48", "nin", "alexnet", "nin_quick", "lenet", "vgg16", "resnet18", "alexnet9", "squeezenet"])
def test_nets_on_constants(script, model: str) -> None:
    nets = script("nets")
    net = Net(net_from_text(to_text(nets.on_constants(model, 1))), phase=pb.TRAIN, backend=backends.get("numpy"))
    images = nets.NETS[model]
    assert net.blobs["data"].shape == (1, images.channels, images.size, images.size)
    assert net.batch_size == 1
    scores = next(step for step in net.steps if step.node.layer.type == "SoftmaxWithLoss").bottoms[0]
    assert scores.count == images.classes


@pytest.mark.parametrize("cached", [False, True])
def test_nets_on_a_database(script, tmp_path: Path, cached: bool) -> None:
    net = script("nets").on_database("nin_crop48", 7, tmp_path, cached=cached)
    assert [layer.type for layer in net.layer].count("Data") == 1
    data = net.layer[0].data_param
    assert (data.source, data.batch_size, data.cache == pb.DataParameter.DEVICE) == (str(tmp_path), 7, cached)
    assert all(layer.type != "Accuracy" for layer in net.layer)


# --- all together ----------------------------------------------------------------------------------------------------------


def test_calls_fit_into_nine_minutes_and_name_scripts_that_exist(script) -> None:
    gpu = script("gpu")
    parts = list(gpu.parts("out"))
    for call in (1, 2, 3, 4):
        assert sum(part.seconds for part in parts if part.call in (0, call)) <= 9 * 60
    assert all((ROOT / "benchmarks" / part.command[0]).is_file() for part in parts)
    assert set(gpu.SHRUNK) <= {part.name for part in parts}


@pytest.mark.parametrize("dry", [False, True])
def test_flags_of_step_times_are_known(script, dry: bool) -> None:
    gpu, step = script("gpu"), script("gpu_step")
    for part in gpu.chosen(gpu.arguments(["out", *(["--dry-run"] if dry else [])])):
        if part.command[0] == "gpu_step.py":
            args = step.arguments([word.replace("MINUTES", "1.5") for word in part.command[1:]])
            assert (args.minutes, args.dry_run) == (1.5, dry), part.name


def test_a_sanitizer_that_is_missing_is_left_out(script, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = script("gpu")
    args = gpu.arguments(["out", "--call", "3"])
    for found, names in ((None, []), ("/usr/bin/compute-sanitizer", ["memcheck", "racecheck", "initcheck"])):
        monkeypatch.setattr(gpu.shutil, "which", lambda name, found=found: found)
        assert [part.name for part in gpu.chosen(args)] == ["prepare", "training", "training_quick", *names, "compiled_rest"]


def test_a_part_that_hangs_is_cut_off_and_the_next_one_runs(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = script("gpu")
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(script("gpu_tests"), "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "hangs.py").write_text("import time; time.sleep(600)")
    (tmp_path / "benchmarks" / "speaks.py").write_text("print('said'); raise SystemExit(3)")
    parts = [gpu.Part("first", 1, 1, ("hangs.py",)), gpu.Part("second", 1, 100, ("speaks.py",))]
    rows = gpu.run_all(parts, tmp_path, 101 / 60)
    assert [line.split(" after")[0].split() for line in rows] == [["first", "cut", "off"], ["second", "exit", "status", "3"]]
    assert (tmp_path / "second.log").read_text().endswith("\nsaid\n")
    assert (tmp_path / "summary.txt").read_text().splitlines() == rows


def test_packages_that_are_missing_come_from_the_wheels(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, calls = script("gpu"), []
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, check: calls.append(command))
    gpu.install_missing()
    assert calls == []  # all is there
    monkeypatch.setattr(gpu, "IMPORTS", {"numpy": "numpy", "no_such": "no-such", "no_such.part": "other"})
    monkeypatch.setattr(gpu, "WHEELS", tmp_path / "missing")
    with pytest.raises(SystemExit, match=r"gpu: no-such other cannot be imported, and there is no .*missing: run `make gpu-wheels`"):
        gpu.install_missing()
    monkeypatch.setattr(gpu, "WHEELS", tmp_path)
    gpu.install_missing()
    assert calls[0][-2:] == ["no-such", "other"]
    assert {"--no-index", "--no-deps", str(tmp_path)} <= set(calls[0])


# --- the tests that run ----------------------------------------------------------------------------------------------------


def test_the_tests_of_the_backend_are_all_there(script) -> None:
    files = script("gpu_tests").files()
    assert files[:3] == ["test_op_inner_product", "test_op_convolution", "test_cuda_gemm"]
    assert {path.stem for name in ("op", "layer", "golden", "pycaffe") for path in (ROOT / "tests").glob(f"test_{name}*.py")} <= set(files)
    assert all((ROOT / "tests" / f"{name}.py").is_file() for name in files)
    assert "benchmarks/gpu_tests.py\n" in (ROOT / "Makefile").read_text().partition("\ntest-gpu:")[2].partition("\n\n")[0] + "\n"


EMULATED = {"test_cli_out_of_memory", "test_cli_roofline", "test_cuda_cache"}  # ask for the emulator themselves


def test_every_test_that_takes_a_backend_runs_on_a_gpu(script) -> None:
    """A test of some file that asks for the backends, or for the cuda backend, asks for a GPU there."""
    asking = set()
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
        wanted = {"backend", "cuda", "make"}
        if any(node.name.startswith("test_") and wanted & {each.arg for each in node.args.args} for node in functions):
            asking.add(path.stem)
    files = set(script("gpu_tests").files())
    assert {"test_params", "test_op_lrn"} <= asking
    assert asking - files == EMULATED
    assert {"test_data_warp", "test_cuda_tensor_map"} <= files, "what a GPU's transform and TMA are told is made on the host"


def test_what_failed_is_told(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = script("gpu_tests")
    monkeypatch.setattr(tests, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text("def pytest_addoption(parser): parser.addoption('--backend')\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    text = "import pytest, warnings\nheld = []\n@pytest.mark.parametrize('n', [1, 2, 3])\ndef test_it(n):\n    warnings.warn('old', stacklevel=1)\n"
    text += "    held.append(n)\n    assert n != 2, 'two is wrong'\n    assert held in ([1], [3]), 'broken by one before'\n"
    (tmp_path / "tests" / "test_some.py").write_text(text)
    args = argparse.Namespace(prefix="", out=tmp_path)
    end = time.perf_counter() + 100
    result = tests.run("test_some", ["tests/test_some.py"], args, end)
    assert (result.status, result.passed, list(result.failed)) == (1, 1, ["tests/test_some.py::test_it[2]", "tests/test_some.py::test_it[3]"])
    alone = [tests.run(f"alone-{number}", [test], args, end) for number, test in enumerate(result.failed)]
    lines = tests.report([result], alone).splitlines()
    assert lines[1].startswith("FAILED tests/test_some.py::test_it[2] [alone: fails too] AssertionError: two is wrong")
    assert lines[2].startswith("FAILED tests/test_some.py::test_it[3] [alone: passes] AssertionError: broken by one before")
    assert lines[3] == "1 passed, 2 failed, 1 of 1 files not clean"
    assert "cut off" in tests.run("late", ["tests/test_some.py"], args, time.perf_counter()).line


def test_what_a_command_started_is_killed_with_it(script) -> None:
    tests, child = script("gpu_tests"), "print('up', flush=True); import time; time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    reading, writing = os.pipe()
    with open(reading) as said:
        with open(writing, "w") as out:
            assert tests.bounded([sys.executable, "-c", parent], dict(os.environ), out, 3) == tests.CUT_OFF
        assert said.read() in ("up\n", "")  # which ends when nobody can write any more


# --- tiles and trainings ---------------------------------------------------------------------------------------------------


def test_rows_of_tiles(script) -> None:
    tiles = script("gpu_tiles")
    formula, other = "64x64, 1 splits of 128", "128x64, 2 splits of 64"
    entry = {"chosen": other, "seconds": {formula: 3e-5, other: 2e-5}}
    assert tiles._row("nin:128", "data tf32", formula, entry) == f"| nin:128 | data tf32 | {formula} | 30.0 | {other} | 20.0 |  |  |  |  | 1.50 |  |"
    group, boxes = "128x96, 1 splits of 128", "128x128, 1 splits of 128"
    entry["seconds"] |= {f"wgmma {group}": 1.25e-5, f"wgmma {boxes}": 4e-5, f"tma {boxes}": 1e-5}
    want = f"| nin:128 | data bf16 | {formula} | 30.0 | {other} | 20.0 | {group} | 12.5 | {boxes} | 10.0 | 3.00 | 2.00 |"
    assert tiles._row("nin:128", "data bf16", formula, entry) == want
    assert tiles._row("nin:128", "data bf16", formula, None).count("|") == want.count("|")


def test_runs_that_differ_are_told(script, tmp_path: Path) -> None:
    training, folders = script("gpu_training"), [tmp_path / "whole", tmp_path / "parts"]
    for folder, losses in zip(folders, ([3.0, *[1.0] * 4], [3.0, *[1.0] * 3, "nan"])):
        folder.mkdir()
        lines = [json.dumps({"event": "train", "iteration": n, "loss": loss}) for n, loss in enumerate(losses)]
        (folder / "run_metrics.jsonl").write_text("\n".join([*lines, '{"event": "tr']))  # the last line is cut short
        (folder / "run_iter_2.caffemodel").write_bytes(folder.name.encode())
        (folder / "run_iter_2.solverstate").write_bytes(b"at " + str(folder).encode())
    wrong = training.check(folders, 2)
    assert wrong == ["parts: a loss is not finite: [3.0, 1.0, 1.0, 1.0, 'nan']", "run_iter_2.caffemodel: the resumed run's differs from the whole run's"]
    (folders[1] / "run_metrics.jsonl").write_text((folders[0] / "run_metrics.jsonl").read_text())
    (folders[1] / "run_iter_2.caffemodel").write_bytes(b"whole")
    assert training.check(folders, 2) == []
    for folder in folders:
        (folder / "run_metrics.jsonl").write_text('{"event": "train", "iteration": 0, "loss": 3.0}\n{"event": "train", "iteration": 1, "loss": 3.5}\n')
    assert training.check(folders, 2)[0] == "whole: the loss did not fall: 3.0 at first, [3.0, 3.5] at last"
    assert training.check(folders, 2, falls=False) == []


def test_what_the_host_does_is_measured_without_a_gpu(script) -> None:
    assert script("host_overhead").microseconds("lenet", 1, 1) >= 0
