"""Solver states on disk: Caffe's binary .solverstate and its HDF5 form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from caffelite.errors import SnapshotError, Where
from caffelite.files import write_atomically
from caffelite.hdf5 import h5py_module, open_hdf5, write_hdf5
from caffelite.schema import array_to_blob, blob_to_array, message_bytes, pb, read_solverstate

RUN_DATASET = "caffelite_run"  # bytes of a RunState; Caffe reads only the datasets it knows


def read_state(path: str | Path) -> pb.SolverState:
    """A solver state; HDF5 for a name that ends in .h5. SnapshotError when it is missing, damaged or something else."""
    if not str(path).endswith(".h5"):
        return read_solverstate(str(path))
    state = pb.SolverState()
    with open_hdf5(path) as file:
        missing = [name for name in ("iter", "history") if name not in file]
        if missing:
            raise SnapshotError(f"no {' and '.join(missing)} in this HDF5 file: it is no solver state", where=Where(str(path)))
        try:
            _fill(state, file)
        except (KeyError, OSError, ValueError, TypeError, RuntimeError) as error:
            raise SnapshotError(f"the file is damaged: {error}", where=Where(str(path)), hint="take an older snapshot") from error
    return state


def _fill(state: pb.SolverState, file: Any) -> None:
    state.iter = int(np.ravel(file["iter"][()])[0])
    if "current_step" in file:
        state.current_step = int(np.ravel(file["current_step"][()])[0])
    if "learned_net" in file:
        name = file["learned_net"][()]
        state.learned_net = name.decode() if isinstance(name, bytes) else str(name)
    history = file["history"]
    for index in range(len(history)):
        array_to_blob(np.asarray(history[str(index)], np.float32), state.history.add())
    if RUN_DATASET in file:
        state.run.ParseFromString(np.asarray(file[RUN_DATASET], np.uint8).tobytes())


def write_state(path: Path, state: pb.SolverState) -> None:
    """Writes a solver state atomically; HDF5 for a name that ends in .h5. SnapshotError when it cannot be written."""
    if path.suffix == ".h5":
        write_hdf5(path, lambda file: _fill_file(file, state))
    else:
        write_atomically(path, lambda file: file.write(message_bytes(state)))


def _fill_file(file: Any, state: pb.SolverState) -> None:
    h5py = h5py_module()
    file["iter"] = np.array([state.iter], np.int32)
    file["current_step"] = np.array([state.current_step], np.int32)
    # Caffe reads this into a buffer of the stored size and needs the terminating zero in it.
    name = state.learned_net.encode() + b"\0"
    kind = h5py.h5t.TypeID.copy(h5py.h5t.C_S1)
    kind.set_size(len(name))
    kind.set_strpad(h5py.h5t.STR_NULLTERM)
    dataset = h5py.h5d.create(file.id, b"learned_net", kind, h5py.h5s.create(h5py.h5s.SCALAR))
    dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, np.array(name, dtype=f"S{len(name)}"), mtype=kind)
    history = file.create_group("history")
    for index, blob in enumerate(state.history):
        history[str(index)] = blob_to_array(blob)
    file[RUN_DATASET] = np.frombuffer(state.run.SerializeToString(), np.uint8)
