"""A GPU without enough memory: what is said of it, at the start and in the middle of a run, and that the last snapshot stays whole."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from cli_harness import said, values
from data_samples import write_lmdb
from test_solver_footprint import choices, write_solver

from caffelite.backends.contract import Backend
from caffelite.cli import out_of_memory
from caffelite.cli.common import megabytes
from caffelite.cli.out_of_memory import batches, cut, fitting_batch
from caffelite.errors import OutOfMemoryError
from caffelite.schema import net_from_text
from caffelite.solver.footprint import footprint
from caffelite.solver.snapshot import find_newest

TRAIN = ("train", "--solver", "solver.prototxt", "--backend", "cuda")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a database of 24 images and a GPU that is emulated."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAFFELITE_CUDA_DRIVER", "emulator")
    write_lmdb(tmp_path / "db", values())
    return tmp_path


def peak(batch: int = 7, precision: str = "float32") -> int:
    param, nets = choices()
    cuts = [type(net)(cut(net.spec, batch), net.origin, net.phase, net.level, net.stages, net.test_iter) for net in nets]
    return footprint(cuts, precision=precision, param=param).peak


def limit(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    monkeypatch.setenv("CAFFELITE_EMULATOR_MEMORY", str(room / 2**20))


def test_the_largest_batch_that_fits_is_found() -> None:
    """Tests of one batch each: a whole database's last batch, and so its net, would be smaller or larger by turns."""
    write_solver("short", "", "test_interval: 1 test_iter: 1")
    param, nets = choices()
    needs = [0, *(peak(batch) for batch in range(1, 8))]
    assert needs == sorted(needs)
    assert needs[1] < needs[3] < needs[7]
    for batch in range(1, 7):
        last = max(b for b in range(8) if needs[b] <= needs[batch])
        assert fitting_batch(nets, "float32", param, needs[batch], needs[7]) == min(last, 6)
        assert needs[fitting_batch(nets, "float32", param, needs[batch] - 1, needs[7])] < needs[batch]
    assert fitting_batch(nets, "float32", param, needs[1] - 1, needs[7]) == 0


def test_batches_are_cut_wherever_a_net_starts() -> None:
    spec = net_from_text("""
layer { name: "a" type: "Data" top: "a" data_param { source: "db" batch_size: 9 } }
layer { name: "b" type: "Input" top: "b" input_param { shape { dim: 5 dim: 12 } } }
layer { name: "c" type: "DummyData" top: "c" dummy_data_param { shape { dim: 11 dim: 3 } shape { dim: 2 } } }
""")
    assert batches(spec) == 11
    small = cut(spec, 4)
    assert [batches(net_from_text(f"layer {{ {layer} }}")) for layer in small.param.layer] == [4, 4, 4]
    assert [list(shape.dim) for shape in small.param.layer[2].dummy_data_param.shape] == [[4, 3], [2]]
    assert batches(spec) == 11, "the net itself stays as it is"


def test_it_says_what_is_needed_and_what_would_fit(cuda: Backend, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_solver("long", "", "")
    net = Path("net.prototxt")  # with more channels in one place, so that activations count beside scratch memory
    net.write_text(net.read_text().replace("num_output: 8 kernel_size: 1", "num_output: 64 kernel_size: 1"))
    whole, room = peak(), peak(2)
    assert room < whole
    limit(monkeypatch, room)
    param, nets = choices()
    batch = fitting_batch(nets, "float32", param, room, whole)
    _, err = said(capsys, *TRAIN, status=1)
    mb = [megabytes(count) for count in (whole, room)]
    error = err[err.index("caffelite: error") :]
    assert re.search(rf"out of memory on the emulated GPU: this run needs {mb[0]} in all; {mb[1]} of {mb[1]} are available\n", error)
    assert f"  batch_size {batch} fits" in error
    assert batch >= 2
    lower = peak(precision="bfloat16")
    assert lower < whole
    limit(monkeypatch, lower)
    assert f"--precision bfloat16 needs {megabytes(lower)}" in said(capsys, *TRAIN, status=1)[1]
    said(capsys, *TRAIN, "--precision", "bfloat16")
    limit(monkeypatch, 4096)
    assert "not even batch_size 1 fits" in said(capsys, *TRAIN, status=1)[1]


def test_the_whole_run_is_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    write_solver("short", "", "")
    param, nets = choices()
    planned: list[int] = []

    def counted(choices: Any, **options: Any) -> Any:
        planned.append(batches(choices[0].spec))
        return footprint(choices, **options)

    room, total = peak(2), peak()
    monkeypatch.setattr(out_of_memory, "footprint", counted)
    error = OutOfMemoryError("the GPU", wanted=1, free=room, total=total, used=0)
    with pytest.raises(OutOfMemoryError), out_of_memory.explained(lambda: nets, "bfloat16", param):
        raise error
    assert "batch_size" in str(error)
    assert planned.count(7) == 1


def test_time_and_test_say_it_too(cuda: Backend, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_solver("short", "", "")
    said(capsys, *TRAIN)
    limit(monkeypatch, 50_000)
    test = ("test", "--model", "net.prototxt", "--weights", "out_iter_2.caffemodel")
    for command in (("time", "--solver", "solver.prototxt"), ("time", "--model", "net.prototxt"), test):
        _, err = said(capsys, *command, "--gpu", "0", status=1)
        assert "out of memory on the emulated GPU: this run needs " in err
        assert "in all; 48.8 KB of 48.8 KB are available\n" in err


def test_in_the_middle_of_a_run_the_last_snapshot_stays_whole(cuda: Backend, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What is allocated last is the net for the test's last, smaller batch: at the first test, after the snapshot of iteration 1."""
    write_solver("short", "snapshot: 1 test_initialization: false", "test_interval: 2")
    limit(monkeypatch, peak() - 1)
    _, err = said(capsys, *TRAIN, "--iterations", "3", status=1)
    assert "  the last snapshot is whole: out_iter_2.solverstate" in err
    assert find_newest("out", print) == Path("out_iter_2.solverstate")
    monkeypatch.delenv("CAFFELITE_EMULATOR_MEMORY")
    out, _ = said(capsys, *TRAIN, "--snapshot", "auto", "--iterations", "3")
    assert "done at iteration 3" in out
