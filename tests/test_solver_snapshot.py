"""Snapshots: what is written and when it counts, keeping and finding them, and taking a run up again."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from solver_harness import IMAGES, LINEAR, RATE, Recorder, linear_solver, make_solver, weights_of

from caffelite.errors import SnapshotError
from caffelite.schema import message_bytes, pb
from caffelite.solver.loop import Solver
from caffelite.solver.snapshot import find_newest
from caffelite.solver.state_files import read_state, write_state


def trained(folder: Path, steps: int = 3, extra: str = "") -> Solver:
    solver = linear_solver(f'{RATE} momentum: 0.9 random_seed: 2 snapshot_prefix: "{folder}/s" {extra}')
    solver.step(steps)
    return solver


def assert_same_state(a: Solver, b: Solver) -> None:
    assert a.iter == b.iter
    for label, values in weights_of(a).items():
        np.testing.assert_array_equal(values, weights_of(b)[label])
    for mine, theirs in zip(a.history, b.history):
        np.testing.assert_array_equal(a.backend.to_host(mine.flat), b.backend.to_host(theirs.flat))


# --- what is written -----------------------------------------------------------------------------------------------------


def test_the_state_file_is_caffes(tmp_path: Path) -> None:
    solver = trained(tmp_path)
    path = solver.snapshot()
    assert path == tmp_path / "s_iter_3.solverstate"
    state = pb.SolverState.FromString(path.read_bytes())
    assert (state.iter, state.learned_net, state.current_step) == (3, f"{tmp_path}/s_iter_3.caffemodel", 0)
    assert [list(blob.shape.dim) for blob in state.history] == [[3, 5], [3]]
    np.testing.assert_array_equal(np.array(state.history[0].data).reshape(3, 5), solver.backend.to_host(solver.history[0].parts[0]))
    model = pb.NetParameter.FromString((tmp_path / "s_iter_3.caffemodel").read_bytes())
    layer = next(layer for layer in model.layer if layer.name == "ip")
    np.testing.assert_array_equal(np.array(layer.blobs[0].data).reshape(3, 5), weights_of(solver)["ip/0"])
    assert not layer.blobs[0].diff


def test_snapshot_diff_saves_the_last_step(tmp_path: Path) -> None:
    solver = trained(tmp_path, 2, "snapshot_diff: true")
    before = weights_of(solver)["ip/0"]
    solver.step(1)
    solver.snapshot()
    model = pb.NetParameter.FromString((tmp_path / "s_iter_3.caffemodel").read_bytes())
    diff = np.array(next(layer for layer in model.layer if layer.name == "ip").blobs[0].diff).reshape(3, 5)
    np.testing.assert_allclose(diff, before - weights_of(solver)["ip/0"], atol=1e-6)


def test_the_prefix_is_recorded_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    solver = make_solver(f'{RATE} snapshot_prefix: "./runs/a"', LINEAR)
    os.mkdir("runs")
    assert read_state(solver.snapshot()).learned_net == "./runs/a_iter_0.caffemodel"


def test_a_missing_folder_is_made_at_the_start(tmp_path: Path) -> None:
    make_solver(f'{RATE} snapshot: 5 snapshot_prefix: "{tmp_path}/new/deep/s"', LINEAR)
    assert (tmp_path / "new" / "deep").is_dir()
    assert os.listdir(tmp_path / "new" / "deep") == []


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SnapshotError, match=r"cannot write snapshots in .*file/sub.*\n.*change snapshot_prefix"):
        make_solver(f'{RATE} snapshot: 5 snapshot_prefix: "{tmp_path}/file/sub/s"', LINEAR)


def test_hdf5_without_its_library_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(SnapshotError, match=r"HDF5 files need h5py, which is not installed\n.*BINARYPROTO"):
        make_solver(f'{RATE} snapshot: 5 snapshot_format: HDF5 snapshot_prefix: "{tmp_path}/s"', LINEAR)


# --- whole or not at all -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_failed_write_leaves_the_last_snapshot_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
    solver = trained(tmp_path)
    solver.snapshot()
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    solver.iter = 2  # would be written before, under another name

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    for iteration in (3, 4):  # over the old files, and beside them
        solver.iter = iteration
        with monkeypatch.context() as patched:
            patched.setattr(os, call, fail)
            with pytest.raises(SnapshotError, match=f"cannot write .*s_iter_{iteration}.caffemodel: {os.strerror(code)}"):
                solver.snapshot()
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept


FULL = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from solver_harness import RATE, linear_solver
solver = linear_solver(RATE + 'max_iter: 9 snapshot: 2 snapshot_prefix: "' + sys.argv[2] + '/s"')
class Full:
    def __getattr__(self, name):
        return lambda *args: name == "on_snapshot" and resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
solver.listeners.append(Full())
try:
    solver.solve()
except Exception as error:
    print(type(error).__name__, error.exit_code, error)
"""


def run_script(script: str, folder: Path, **options: object) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-c", script, str(Path(__file__).parent), str(folder)]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload,no-any-return]


def test_a_quota_reached_in_mid_write_leaves_the_last_snapshot_whole(tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    result = run_script(FULL, tmp_path)
    assert result.stdout.startswith(f"SnapshotError 1 cannot write {tmp_path}/s_iter_4.caffemodel: File too large\n  the disk or quota is full"), result
    assert sorted(os.listdir(tmp_path)) == ["s_iter_2.caffemodel", "s_iter_2.solverstate"]
    linear_solver(RATE).restore(tmp_path / "s_iter_2.solverstate")


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from solver_harness import RATE, linear_solver
solver = linear_solver(RATE + 'max_iter: 9 snapshot: 2 random_seed: 1 snapshot_prefix: "' + sys.argv[2] + '/s"')
kills = int(sys.argv[3]) if len(sys.argv) > 3 else 4
sync, calls = os.fsync, []
def fsync(handle):
    calls.append(handle)
    if len(calls) == POINT:
        os.kill(os.getpid(), signal.SIGKILL)
    sync(handle)
os.fsync = fsync
solver.solve()
"""


# Each snapshot syncs four times: model, its folder, state, its folder. 5 to 8 lie in the second snapshot.
@pytest.mark.parametrize(("point", "newest"), [(5, 2), (6, 2), (7, 2), (8, 4)])
def test_a_kill_at_any_moment_leaves_a_whole_snapshot(tmp_path: Path, point: int, newest: int) -> None:
    result = run_script(KILLED.replace("POINT", str(point)), tmp_path)
    assert result.returncode == -9, result.stderr
    found = find_newest(f"{tmp_path}/s", pytest.fail)
    assert found == tmp_path / f"s_iter_{newest}.solverstate"
    solver = linear_solver(f'{RATE} max_iter: 9 snapshot: 2 snapshot_prefix: "{tmp_path}/s"')
    solver.restore(found)
    assert solver.iter == newest
    assert [name for name in os.listdir(tmp_path) if "partial" in name] == []  # the next run clears what the killed one left


# --- keeping and finding -------------------------------------------------------------------------------------------------


def test_only_the_newest_pairs_of_this_run_are_kept(tmp_path: Path) -> None:
    others = ["s_iter_1.caffemodel", "s_iter_1.solverstate", "s_iter_x.solverstate", "s_best.caffemodel", "s2_iter_1.solverstate", "s_iter_99.solverstate"]
    for name in others:
        (tmp_path / name).write_text("not mine")
    solver = linear_solver(f'{RATE} max_iter: 10 snapshot: 2 snapshot_keep: 2 snapshot_prefix: "{tmp_path}/s"')
    solver.solve()
    mine = [f"s_iter_{n}.{kind}" for n in (8, 10) for kind in ("caffemodel", "solverstate")]
    assert sorted(os.listdir(tmp_path)) == sorted(others + mine)


def test_a_resumed_run_goes_on_counting_its_pairs(tmp_path: Path) -> None:
    text = f'{RATE} snapshot: 2 snapshot_keep: 2 snapshot_prefix: "{tmp_path}/s"'
    linear_solver(f"{text} max_iter: 4").solve()
    linear_solver(f"{text} max_iter: 6").solve(tmp_path / "s_iter_4.solverstate")
    assert sorted(os.listdir(tmp_path)) == [f"s_iter_{n}.{kind}" for n in (4, 6) for kind in ("caffemodel", "solverstate")]


def test_a_new_run_over_the_snapshots_of_another_is_told_so(tmp_path: Path) -> None:
    def warnings(extra: str, resume: Path | None = None) -> list[str]:
        heard = Recorder()
        linear_solver(f'{RATE} snapshot_prefix: "{tmp_path}/s" {extra}', listeners=[heard]).solve(resume)
        return heard.warnings()

    assert not warnings("max_iter: 12 snapshot: 9")
    (said,) = warnings("max_iter: 3")
    assert said.startswith(f"{tmp_path}/s_iter_12.solverstate is of another run; ")
    assert not warnings("max_iter: 3 snapshot_after_train: false")
    assert not warnings("max_iter: 14", tmp_path / "s_iter_12.solverstate")


def test_find_newest_skips_what_is_damaged_and_says_why(tmp_path: Path) -> None:
    solver = linear_solver(f'{RATE} max_iter: 20 snapshot: 2 snapshot_prefix: "{tmp_path}/s"')
    solver.solve()
    (tmp_path / "s_iter_20.solverstate").write_bytes((tmp_path / "s_iter_20.solverstate").read_bytes()[:-9])
    (tmp_path / "s_iter_18.caffemodel").unlink()
    (tmp_path / "s_iter_16.caffemodel").write_bytes(b"\xff" * 50)
    (tmp_path / "s_iter_14.solverstate").write_bytes((tmp_path / "s_iter_12.solverstate").read_bytes())
    (tmp_path / "s_iter_12.solverstate").write_bytes(b"")
    heard: list[str] = []
    assert find_newest(f"{tmp_path}/s", heard.append) == tmp_path / "s_iter_10.solverstate"
    assert [text.split("_iter_")[1].split(".")[0] for text in heard] == ["20", "18", "16", "14", "12"]
    assert "the file of" in heard[0]
    assert "which is missing" in heard[1]
    assert "it holds iteration 12" in heard[3]
    assert "the file is empty" in heard[4]


def test_find_newest_orders_by_number_not_by_name(tmp_path: Path) -> None:
    solver = linear_solver(f'{RATE} snapshot_prefix: "{tmp_path}/s"')
    for iteration in (9, 10, 100):
        solver.iter = iteration
        solver.snapshot()
    assert find_newest(f"{tmp_path}/s", pytest.fail) == tmp_path / "s_iter_100.solverstate"


def test_find_newest_tells_of_a_run_that_started_anew(tmp_path: Path) -> None:
    solver = linear_solver(f'{RATE} snapshot_prefix: "{tmp_path}/s"')
    for iteration, when in ((3, 2_000), (5, 3_000), (10, 1_000)):
        solver.iter = iteration
        os.utime(solver.snapshot(), (when, when))
    heard: list[str] = []
    highest, later = (tmp_path / f"s_iter_{iteration}.solverstate" for iteration in (10, 5))
    assert find_newest(f"{tmp_path}/s", heard.append) == highest
    assert heard == [f"{highest} has the highest iteration and is taken, but {later} was written later: to go on from that one, give --snapshot {later}"]
    os.utime(highest, (4_000, 4_000))
    assert find_newest(f"{tmp_path}/s", pytest.fail) == highest


def test_find_newest_without_any(tmp_path: Path) -> None:
    assert find_newest(f"{tmp_path}/s", pytest.fail) is None
    assert find_newest(f"{tmp_path}/none/s", pytest.fail) is None


def test_the_best_is_kept_apart(tmp_path: Path) -> None:
    heard = Recorder()
    text = f'{RATE} max_iter: 6 test_interval: 1 test_iter: 1 snapshot: 1 snapshot_keep: 1 snapshot_best: "loss" snapshot_prefix: "{tmp_path}/s"'
    solver = make_solver(text, LINEAR, listeners=[heard])
    rng = np.random.default_rng(1)
    for net in (solver.net, solver.test_nets[0]):
        for name in ("x", "t"):
            solver.backend.from_host(rng.normal(size=net.blobs[name].shape).astype(np.float32), net.blobs[name].data)
    solver.solve()
    tested = {event[1]: event[3][0].values[0] for event in heard.named("test")}
    lowest, expected = float("inf"), []
    for iteration, loss in tested.items():
        if loss < lowest:
            lowest = loss
            expected.append(("best", iteration, "loss", loss, f"{tmp_path}/s_best.caffemodel"))
    assert heard.named("best") == expected
    assert 0 < len(expected) < 8
    state = read_state(tmp_path / "s_best.solverstate")
    assert (state.iter, state.run.best_iter, state.run.best_value) == (expected[-1][1], expected[-1][1], lowest)
    resumed = make_solver(text, LINEAR)
    resumed.restore(tmp_path / "s_best.solverstate")
    assert resumed.best is not None
    assert (resumed.best.value, resumed.best.iteration) == (lowest, expected[-1][1])
    names = sorted(os.listdir(tmp_path))
    assert names == ["s_best.caffemodel", "s_best.solverstate", "s_iter_6.caffemodel", "s_iter_6.solverstate"]


# --- taking up again -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["", 'type: "Adam"'])
@pytest.mark.parametrize("form", ["BINARYPROTO", "HDF5"])
def test_restore_gives_weights_history_and_iteration_back(tmp_path: Path, form: str, kind: str) -> None:
    if form == "HDF5":
        pytest.importorskip("h5py")
    solver = linear_solver(f'{RATE} momentum: 0.9 {kind} snapshot_format: {form} snapshot_prefix: "{tmp_path}/s"')
    solver.step(3)
    path = solver.snapshot()
    assert path.name == "s_iter_3.solverstate" + (".h5" if form == "HDF5" else "")
    other = linear_solver(f"{RATE} momentum: 0.9 {kind}")
    other.restore(path)
    assert_same_state(solver, other)
    for each in (solver, other):
        each.step(4)
    assert_same_state(solver, other)


def test_the_hdf5_state_has_caffes_layout(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    solver = trained(tmp_path, 3, "snapshot_format: HDF5")
    with h5py.File(solver.snapshot(), "r") as file:
        assert file["iter"].shape == file["current_step"].shape == (1,)
        assert file["iter"].dtype == np.int32
        assert file["iter"][0] == 3
        assert file["learned_net"].id.get_type().get_size() == len(f"{tmp_path}/s_iter_3.caffemodel.h5") + 1
        assert file["learned_net"][()].decode() == f"{tmp_path}/s_iter_3.caffemodel.h5"
        assert sorted(file["history"]) == ["0", "1"]
        np.testing.assert_array_equal(file["history"]["0"][()], solver.backend.to_host(solver.history[0].parts[0]))


def test_the_model_is_found_beside_a_state_that_was_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").mkdir()
    monkeypatch.chdir(tmp_path)
    solver = make_solver(f'{RATE} random_seed: 3 snapshot_prefix: "old/s"', LINEAR)
    solver.snapshot()
    os.rename("old", "new")
    other = make_solver(RATE, LINEAR)
    other.restore("new/s_iter_0.solverstate")
    assert_same_state(solver, other)
    os.remove("new/s_iter_0.caffemodel")
    with pytest.raises(SnapshotError, match=r"new/s_iter_0.solverstate belongs to the model old/s_iter_0.caffemodel, which is missing\n  put it beside"):
        other.restore("new/s_iter_0.solverstate")


def test_multistep_goes_on_at_its_step(tmp_path: Path) -> None:
    text = f'base_lr: 1 lr_policy: "multistep" gamma: 0.5 stepvalue: 2 stepvalue: 3 snapshot_prefix: "{tmp_path}/s"'
    solver = linear_solver(text)
    solver.step(3)
    other = linear_solver(text)
    other.restore(solver.snapshot())
    assert other.rates.current_step == solver.rates.current_step == 1
    assert other.lr == 0.25


# --- what does not fit -----------------------------------------------------------------------------------------------------


def test_another_solver_type_does_not_fit(tmp_path: Path) -> None:
    path = trained(tmp_path).snapshot()
    with pytest.raises(SnapshotError) as caught:
        linear_solver(f'{RATE} type: "Adam"').restore(path)
    assert str(caught.value).startswith(f"{path}: the state has 2 history blob(s), this solver needs 4 (2 for each of 2 parameters)\n  it was saved by")


def test_another_net_does_not_fit(tmp_path: Path) -> None:
    path = trained(tmp_path).snapshot()
    other = make_solver(RATE, LINEAR.replace("num_output: 3", "num_output: 4").replace("dim: 7 dim: 3", "dim: 7 dim: 4"))
    before = weights_of(other)
    with pytest.raises(SnapshotError) as caught:
        other.restore(path)
    assert str(caught.value).startswith(f"{path}: layer 'ip': history blob 0 belongs to parameter 0 and has shape (3, 5), the net has (4, 5)")
    assert other.iter == 0
    np.testing.assert_array_equal(weights_of(other)["ip/0"], before["ip/0"])


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"", "the file is empty"), (b"\xff\x01garbage" * 9, "damaged or of another kind"), (b"iter: 5", "the file is text")],
)
def test_damaged_states(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "s_iter_3.solverstate"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SnapshotError, match=message) as caught:
        linear_solver(RATE).restore(path)
    assert str(caught.value).startswith(str(path))


def test_every_truncation_of_a_state_is_noticed_or_still_whole(tmp_path: Path) -> None:
    path = trained(tmp_path).snapshot()
    data = path.read_bytes()
    for length in range(0, len(data) - 1, 7):
        path.write_bytes(data[:length])
        other = linear_solver(RATE)
        try:
            other.restore(path)
        except SnapshotError:
            assert other.iter == 0
        else:  # cut between two fields after the history: Caffe's own part is whole
            assert other.iter == 3


@pytest.mark.parametrize("damage", ["cut", "kind", "history"])
def test_damaged_hdf5_states(tmp_path: Path, damage: str) -> None:
    h5py = pytest.importorskip("h5py")
    path = trained(tmp_path, 3, "snapshot_format: HDF5").snapshot()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:700])
    elif damage == "kind":
        path = path.with_name("s_iter_3.caffemodel.h5")
    else:
        with h5py.File(path, "r+") as file:
            file["history"].move("1", "one")
    expected = {"cut": "cannot read .* as HDF5", "kind": "it is no solver state", "history": "the file is damaged"}[damage]
    with pytest.raises(SnapshotError, match=expected):
        linear_solver(RATE).restore(path)


def test_a_state_without_our_fields_leaves_seed_and_data_alone(tmp_path: Path) -> None:
    solver = make_solver(f'{RATE} random_seed: 6 snapshot_prefix: "{tmp_path}/s"', IMAGES)
    solver.step(2)
    path = solver.snapshot()
    state = read_state(path)
    assert [(c.layer, c.position, c.phase) for c in state.run.cursor] == [("data", 32, pb.TRAIN)]
    state.ClearField("run")
    write_state(path, state)
    assert pb.SolverState.FromString(path.read_bytes()) == pb.SolverState.FromString(message_bytes(state))
    other = make_solver(f"{RATE} random_seed: 9", IMAGES)
    other.restore(path)
    assert (other.iter, other.seed, other.net.data_layers[0].source.position) == (2, 9, 0)
