"""Snapshots of a run: names, probing, keeping the newest, finding the newest whole one."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from caffelite.errors import CaffeliteError, SnapshotError
from caffelite.files import is_alive
from caffelite.hdf5 import h5py_module
from caffelite.schema import pb
from caffelite.solver.state_files import read_state
from caffelite.weights import read_weights


class SnapshotStore:
    """Where a run's snapshots lie, and which of them are this run's own.

    prefix: as in the solver; a path plus the beginning of a name. keep: how many of the newest pairs stay (0: all).
    """

    def __init__(self, param: pb.SolverParameter) -> None:
        self.prefix, self.keep = param.snapshot_prefix, param.snapshot_keep
        self.suffix = ".h5" if param.snapshot_format == pb.SolverParameter.HDF5 else ""
        self.folder, self.stem = Path(os.path.dirname(self.prefix) or "."), os.path.basename(self.prefix)
        self.own: list[int] = []  # iterations, ascending
        self.last: Path | None = None  # the newest whole state of this run

    def pair(self, iteration: int | str) -> tuple[str, str]:
        """Model and state file names of an iteration, spelled as the prefix is (Caffe records them so)."""
        name = f"{self.prefix}_best" if iteration == "best" else f"{self.prefix}_iter_{iteration}"
        return f"{name}.caffemodel{self.suffix}", f"{name}.solverstate{self.suffix}"

    def probe(self) -> None:
        """Makes the folder if need be and tries to write in it; SnapshotError now rather than after hours of training."""
        if self.suffix:
            h5py_module()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise SnapshotError(
                f"cannot write snapshots in {self.folder}: {error.strerror or error}", hint="change snapshot_prefix, or make the folder writable"
            ) from error
        self._remove_leftovers()

    def another_run(self) -> str | None:
        """What to warn a run of that starts anew where states of the same prefix lie; None where there are none."""
        found = _numbered(self.prefix, self.suffix)
        advice = "this run writes over its snapshots, and --snapshot auto takes the highest iteration: move them, or change snapshot_prefix"
        return f"{found[-1][1]} is of another run; {advice}" if found else None

    def _remove_leftovers(self) -> None:
        """Removes half-written files of processes that were killed (see files.write_atomically)."""
        for path in self.folder.glob(f".{_literal(self.stem)}_*.partial-*"):
            number = path.name.rpartition("-")[2]
            if number.isdigit() and not is_alive(int(number)):
                path.unlink(missing_ok=True)

    def wrote(self, iteration: int, state: Path) -> None:
        """Notes a whole pair and removes this run's oldest ones beyond `keep`, the state before its model."""
        self.last = state
        self.own = sorted({*self.own, iteration})
        while self.keep and len(self.own) > self.keep:
            model, old = self.pair(self.own.pop(0))
            try:
                Path(old).unlink(missing_ok=True)
                Path(model).unlink(missing_ok=True)
            except OSError as error:
                raise SnapshotError(f"cannot remove the old snapshot {old}: {error.strerror or error}") from error

    def resumed(self, state: Path, iteration: int) -> None:
        """Notes that the run goes on from `state`: earlier pairs of the same prefix are its own too."""
        self.last = state
        if state.absolute() == Path(self.pair(iteration)[1]).absolute():
            self.own = [n for n, _ in _numbered(self.prefix, self.suffix) if n <= iteration]


def find_newest(prefix: str, tell: Callable[[str], None]) -> Path | None:
    """The state file of the newest snapshot that is whole: its state and the model it names can both be read.

    The newest is that of the highest iteration: times of files do not outlast copying. tell(text): hears of every higher one that is
    not whole, and of a lower one that was written later, by a run that started anew. None when there is no whole one.
    """
    states = states_of(prefix)
    for position in range(len(states) - 1, -1, -1):
        iteration, path = states[position]
        fault = _fault(path, iteration)
        if fault is None:
            _tell_of_later(path, [other for _, other in states[:position]], tell)
            return path
        tell(f"skipping snapshot {path}: {fault.removeprefix(f'{path}: ')}")
    return None


def _tell_of_later(path: Path, lower: list[Path], tell: Callable[[str], None]) -> None:
    latest = max(lower, key=_time, default=path)
    if _time(latest) > _time(path):
        tell(f"{path} has the highest iteration and is taken, but {latest} was written later: to go on from that one, give --snapshot {latest}")


def _time(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # it has just been removed
        return 0


def states_of(prefix: str) -> list[tuple[int, Path]]:
    """Iteration and path of every state under this prefix, whole or not, in ascending order."""
    return sorted((*_numbered(prefix, ""), *_numbered(prefix, ".h5")))


def _fault(path: Path, iteration: int) -> str | None:
    """What is wrong with a snapshot, None for a whole one."""
    try:
        state = read_state(path)
        if state.iter != iteration:
            return f"it holds iteration {state.iter}"
        read_weights(model_of(state, path))
    except CaffeliteError as error:
        return str(error).splitlines()[0]
    return None


def model_of(state: pb.SolverState, path: Path) -> Path:
    """The model file that a state names: as written, else from the state's folder. SnapshotError when there is none."""
    written = Path(state.learned_net)
    tried = [written, path.parent / written, path.parent / written.name]
    for candidate in tried:
        if candidate.is_file():
            return candidate
    raise SnapshotError(f"{path} belongs to the model {written}, which is missing", hint=f"put it beside the state file, in {path.parent.absolute()}")


def _numbered(prefix: str, suffix: str) -> list[tuple[int, Path]]:
    folder, stem = Path(os.path.dirname(prefix) or "."), os.path.basename(prefix)
    pattern = re.compile(re.escape(stem) + r"_iter_(0|[1-9]\d*)\.solverstate" + re.escape(suffix))
    found = []
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    for name in names:
        match = pattern.fullmatch(name)
        if match:
            found.append((int(match[1]), Path(os.path.join(os.path.dirname(prefix), name))))
    return sorted(found)


def _literal(text: str) -> str:
    """A name in which nothing is special to glob."""
    return re.sub(r"([*?[])", r"[\1]", text)
