"""Where a command's files go when their name is "-": lines to the standard output, pictures and databases nowhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_harness import TRAIN, make_run, said


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained run."""
    return make_run(tmp_path_factory.mktemp("made"))


@pytest.fixture(autouse=True)
def _folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    monkeypatch.setenv("CAFFELITE_BACKEND", "numpy")


def test_metrics_on_the_standard_output_have_it_to_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = said(capsys, *TRAIN, "--metrics", "-", "--snapshot", "auto", "--iterations", "6")
    events = [json.loads(line)["event"] for line in out.splitlines()]
    assert (events[0], events[-1]) == ("start", "end")
    assert err.startswith("resuming from out/small_iter_4.solverstate\n")
    assert "done at iteration 6" in err
    assert "  metrics" not in err
    assert not Path("-").exists()


def test_a_log_on_the_standard_output_has_it_to_itself(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = said(capsys, *TRAIN, "--log", "-")
    lines = [line for line in out.splitlines() if line[:1] == "I" and line[1:5].isdigit()]
    assert lines[0].endswith("] Use CPU.")
    assert any("] Iteration 3, lr = 0.01" in line for line in lines)
    assert "done at iteration 4" not in out
    assert err.splitlines()[-1].startswith("  metrics   out/small_metrics.jsonl")
    assert not Path("-").exists()


def test_two_files_cannot_share_the_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = said(capsys, *TRAIN, "--log", "-", "--metrics", "-", status=2)
    assert (out, err.splitlines()[0]) == ("", "caffelite: error: --log - and --metrics - exclude each other")


def test_training_ends_when_the_reader_of_its_metrics_has_gone() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as out:
        command = [sys.executable, "-m", "caffelite", *TRAIN, "--metrics", "-"]
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": ":".join(sys.path)}, text=True)
    assert (done.returncode, "done at" in done.stderr, "rror" in done.stderr) == (141, False, False)


@pytest.mark.parametrize(
    "command",
    [
        ("mean", "db", "-"),
        ("plot", "out/small", "--out", "-"),
        ("preview", "net.prototxt", "-"),
        ("convert", "imagefolder", "images", "-"),
        ("dataset", "synth", "-"),
        (*TRAIN, "--tensorboard", "-"),
    ],
    ids=lambda command: command[0],
)
def test_other_files_need_a_name(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    out, err = said(capsys, *command, status=2)
    assert out == ""
    assert "'-', the standard output, will not do; give a name (./- if that is the name)" in err
    assert not Path("-").exists()
