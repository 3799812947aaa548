"""Caffe's HDF5 model files (spec net-and-solver 4.4). Needs h5py, the extra `hdf5`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from caffelite.errors import SnapshotError
from caffelite.files import replace_atomically
from caffelite.schema import array_to_blob, pb

if TYPE_CHECKING:
    from caffelite.net import Net


def h5py_module() -> Any:
    """h5py, or a SnapshotError that says how to get it."""
    try:
        import h5py
    except ImportError as error:
        raise SnapshotError(
            "HDF5 files need h5py, which is not installed", hint="pip install 'caffelite[hdf5]', or use snapshot_format: BINARYPROTO"
        ) from error
    return h5py


def open_hdf5(path: str | Path) -> Any:
    """An HDF5 file opened for reading; SnapshotError when it is missing or damaged."""
    h5py = h5py_module()
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise SnapshotError(f"cannot read {path} as HDF5: {error}", hint="the file is missing, cut short or damaged") from error


def read_model(path: str | Path) -> pb.NetParameter:
    """The groups data/LAYER/INDEX (and diff/LAYER/INDEX) of an HDF5 model as a NetParameter."""
    message = pb.NetParameter()
    with open_hdf5(path) as file:
        if "data" not in file:
            raise SnapshotError(f"{path} has no group 'data': it is not a Caffe model", hint="a .solverstate.h5 goes to --snapshot, not to --weights")
        for name, group in file["data"].items():
            layer = message.layer.add(name=name)
            for index in range(1 + max((int(key) for key in group), default=-1)):
                if str(index) not in group:
                    layer.blobs.add()  # a shared parameter, saved with its owner
                    continue
                diffs = file["diff"][name] if "diff" in file and name in file["diff"] else {}
                diff = np.asarray(diffs[str(index)], np.float32) if str(index) in diffs else None
                array_to_blob(np.asarray(group[str(index)], np.float32), layer.blobs.add(), diff)
    return message


def write_model(net: Net, path: Path, diff: bool = False) -> None:
    """Writes data/LAYER/INDEX for every layer's own parameters, and diff/LAYER/INDEX for all when asked."""
    h5py = h5py_module()
    slashed = next((name for name in net.layer_names if "/" in name), None)
    if slashed:
        raise SnapshotError(f"layer name '{slashed}' has a slash, which HDF5 model files cannot hold", hint="use snapshot_format: BINARYPROTO")

    def fill(partial: Path) -> None:
        with h5py.File(partial, "w") as file:
            data = file.create_group("data")
            diffs = file.create_group("diff") if diff else None
            for step in net.steps:
                group = data.create_group(step.layer.name)
                for info, param in zip(step.node.params, step.layer.params):
                    if info.owner is info:
                        group[str(info.index)] = net.backend.to_host(param.master)
                if diffs is not None:
                    group = diffs.create_group(step.layer.name)
                    for index, param in enumerate(step.layer.params):
                        if param.diff is not None:
                            group[str(index)] = net.backend.to_host(param.diff)
        with open(partial, "rb") as written:
            os.fsync(written.fileno())

    replace_atomically(path, fill)
