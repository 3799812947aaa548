"""Flags and environment that several commands share: backend, precision, GPU, level and stages, what signals do."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_harness import SOLVER, TEST, TRAIN, make_run, said

import caffelite
from caffelite import backends, environment
from caffelite.__main__ import main
from caffelite.cli.train import apply_flags, build_parser
from caffelite.errors import DataError, SpecError
from caffelite.pycaffe.settings import new_backend, settings
from caffelite.schema import solver_from_text
from caffelite.solver.config import test_choices as choices_of_tests
from caffelite.solver.config import train_choice

WEIGHTS = "out/small_iter_4.caffemodel"
COMMANDS = {"test": (*TEST, WEIGHTS), "time layers": ("time", "--model", "net.prototxt"), "time steps": ("time", "--solver", "solver.prototxt")}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained run."""
    return make_run(tmp_path_factory.mktemp("made"))


@pytest.fixture
def folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That folder as the working folder."""
    monkeypatch.chdir(made)
    return made


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_the_backend_is_chosen_by_flag_or_environment(
    folder: Path, backend: Any, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--backend", backend.name] if how == "flag" else []
    monkeypatch.setenv("CAFFELITE_BACKEND", "nonsense" if how == "flag" else backend.name)  # the flag wins
    for command in COMMANDS.values():
        assert json.loads(said(capsys, *command, *flags, "--iterations", "1", "--json")[0])["backend"] == backend.name
    said(capsys, *_train(tmp_path), *flags)
    assert _start(tmp_path)["backend"] == backend.name


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("CAFFELITE_BACKEND", "onednm", "did you mean 'onednn'? known ones: auto, numpy, onednn, cuda"),
        ("CAFFELITE_CUDA_DRIVER", "Emulater", "did you mean 'emulator'? known ones: cupy, emulator"),
        ("CAFFELITE_CUDA_DRIVER", "opencl", "known ones: cupy, emulator"),
        ("CAFFELITE_CUDA_TUNE", "yes", "known ones: 0, 1"),
        ("CAFFELITE_EMULATOR", "chek", "did you mean 'check'? known ones: fast, check"),
        ("CAFFELITE_EMULATOR_ORDER", "rand", "did you mean 'random'? known ones: up, down, random, lifo"),
        ("CAFFELITE_EMULATOR_MEMORY", "lots", "give a number of megabytes, such as 512"),
        ("CAFFELITE_EMULATOR_MEMORY", "-1", "give a number of megabytes, such as 512"),
    ],
)
def test_a_wrong_value_in_the_environment_is_a_wrong_command(
    folder: Path, name: str, value: str, advice: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name != "CAFFELITE_BACKEND":
        monkeypatch.setenv("CAFFELITE_BACKEND", "cuda")
        monkeypatch.setenv("CAFFELITE_CUDA_DRIVER", "emulator")
    monkeypatch.setenv(name, value)
    for command in COMMANDS.values():
        out, err = said(capsys, *command, status=2)
        assert (out, err) == ("", f"caffelite: error: {name} is '{value}' in the environment\n  {advice}\n")


def test_pycaffe_tells_a_wrong_backend_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "gpu", None)
    monkeypatch.setenv("CAFFELITE_BACKEND", "gpu")
    with pytest.raises(SpecError, match="CAFFELITE_BACKEND is 'gpu' in the environment\n  known ones: auto, numpy, onednn, cuda"):
        new_backend()


SLIP = "CAFFELITE_BACKENDS in the environment has no effect: did you mean CAFFELITE_BACKEND?"


def test_a_slip_in_a_variables_name_is_warned_of(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CAFFELITE_BACKENDS", "numpy")
    for command in (*COMMANDS.values(), ("check", "net.prototxt")):
        assert said(capsys, *command)[1] == f"caffelite: warning: {SLIP}\n"
    with pytest.warns(UserWarning, match=re.escape(SLIP)):
        new_backend()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *((slip, known) for slip, known in (("CACHE_DIR", "CACHE"), ("TUNE", "CUDA_TUNE"), ("EMULATOR_MEM", "EMULATOR_MEMORY"), ("Debug", "DEBUG"))),
        *((own, None) for own in ("TESTDATA", "DATA", "HOME", "ROOT", "DIR", "MODELS", "GPU", "THREADS", "PRECISION", "VERSION", "LOG")),
        *((known.removeprefix("CAFFELITE_"), None) for known in sorted(environment.KNOWN)),
    ],
)
def test_names_that_are_slips(name: str, meant: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in [other for other in os.environ if other.startswith("CAFFELITE_")]:
        monkeypatch.delenv(other)
    monkeypatch.setenv(f"CAFFELITE_{name}", "")
    assert environment.slips() == []  # not set
    monkeypatch.setenv(f"CAFFELITE_{name}", "1")
    assert environment.slips() == ([f"CAFFELITE_{name} in the environment has no effect: did you mean CAFFELITE_{meant}?"] if meant else [])


def test_all_variables_are_known() -> None:
    names = {value for name, value in vars(environment).items() if name.isupper() and name != "PREFIX" and isinstance(value, str)}
    assert set(environment.KNOWN) == names


def _train(folder: Path) -> tuple[str, ...]:
    """Trains one iteration with snapshots in a folder of their own."""
    (folder / "solver.prototxt").write_text(SOLVER.replace("out/small", f"{folder}/small"))
    return ("train", "--solver", str(folder / "solver.prototxt"), "--iterations", "1")


def _start(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "small_metrics.jsonl").read_text().splitlines()[0])
    return found


def test_precision_reaches_every_command(folder: Path, backend: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = []
    for precision in ("float32", "bfloat16", *(("tf32",) if backend.name == "cuda" else ())):
        flags = ("--backend", backend.name, "--precision", precision)
        for command in COMMANDS.values():
            found = json.loads(said(capsys, *command, *flags, "--iterations", "1", "--json")[0])
            assert found["precision"] == precision
            losses += [found["outputs"]["loss"]] if "outputs" in found else []
        said(capsys, *_train(tmp_path), *flags)
        assert _start(tmp_path)["precision"] == precision
    assert len(set(losses)) == len(losses)
    assert losses == pytest.approx([losses[0]] * len(losses), rel=0.05)


@pytest.mark.parametrize("command", [TRAIN, *COMMANDS.values()], ids=["train", *COMMANDS])
def test_tf32_is_for_gpus(folder: Path, command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    out, err = said(capsys, *command, "--backend", "numpy", "--precision", "tf32", status=1)
    assert (out, "tf32, which is a format of CUDA devices" in err, "use float32 or bfloat16" in err) == ("", True, True)


@pytest.mark.parametrize("command", [TRAIN, *COMMANDS.values()], ids=["train", *COMMANDS])
def test_a_gpu_that_is_not_there_is_never_replaced(
    folder: Path, command: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)  # as where it is not installed
    monkeypatch.delenv("CAFFELITE_CUDA_DRIVER", raising=False)
    for flags in (["--gpu", "0"], ["-gpu=3"], ["--backend", "cuda"]):
        out, err = said(capsys, *command, *flags, status=1)
        assert (out, "the cuda backend needs CuPy" in err, "in a clone of caffelite: pip install '.[cuda13]'" in err) == ("", True, True)


def test_level_and_stages_are_the_training_nets() -> None:
    """As in Caffe: a test net has the solver's test_state."""
    net = 'layer { name: "x" type: "Input" top: "x" input_param { shape { dim: 1 } } }'
    spec = solver_from_text(f'net_param {{ {net} }} test_iter: 1 test_interval: 1 test_state {{ stage: "t" }}')
    apply_flags(spec, build_parser("train").parse(["--solver", "s", "--level", "2", "--stage", "a,b"]))
    train = train_choice(spec)
    assert (train.level, train.stages) == (2, ("a", "b"))
    assert [(test.level, test.stages) for test in choices_of_tests(spec, train)] == [(0, ("t",))]


def test_what_signals_do_is_chosen_by_flags(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []

    def solver(spec: object, **options: Any) -> None:
        seen.append(options["effects"])
        raise DataError("seen enough")

    monkeypatch.setattr("caffelite.cli.train.Solver", solver)
    said(capsys, *TRAIN, status=1)
    said(capsys, *TRAIN, "--sigint_effect=snapshot", "-sighup_effect", "stop", status=1)
    assert seen == [{"SIGINT": "stop", "SIGTERM": "stop", "SIGHUP": "snapshot"}, {"SIGINT": "snapshot", "SIGTERM": "snapshot", "SIGHUP": "stop"}]


def test_time_prints_one_object(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = said(capsys, *COMMANDS["time steps"], "--backend", "numpy", "--iterations", "2", "--json")
    assert out.count("\n") == 1
    assert {"step_ms", "images_per_s", "peak_rss_mb", "iterations", "batch"} <= set(json.loads(out))
    assert sorted(os.listdir("out")) == [f"small_iter_{k}.{kind}" for k in (2, 4) for kind in ("caffemodel", "solverstate")] + ["small_metrics.jsonl"]


def test_an_empty_variable_counts_as_none(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CAFFELITE_BACKEND", "")
    assert json.loads(said(capsys, *COMMANDS["test"], "--iterations", "1", "--json")[0])["backend"] == backends.get().name
    assert caffelite.Net("net.prototxt", caffelite.TEST).blobs["data"].shape == (6, 3, 6, 6)


def test_device_query_says_each_thing_in_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["device-query"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "          tf32: not available: the numpy backend cannot run in tf32, which is a format of CUDA devices" in lines
    assert "  use float32 or bfloat16" not in lines
