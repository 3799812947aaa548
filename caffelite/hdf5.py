"""Caffe's HDF5 model files. Needs h5py, the extra `hdf5`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from caffelite.errors import SnapshotError
from caffelite.files import write_atomically
from caffelite.schema import array_to_blob, pb

if TYPE_CHECKING:
    from caffelite.net import Net


MOST_BLOBS = 1000  # of one layer; no type has more than a few


def h5py_module() -> Any:
    """h5py, or a SnapshotError that says how to get it."""
    try:
        import h5py
    except ImportError as error:
        raise SnapshotError(
            "HDF5 files need h5py, which is not installed", hint="in a clone of caffelite: pip install '.[hdf5]', or use snapshot_format: BINARYPROTO"
        ) from error
    return h5py


def open_hdf5(path: str | Path) -> Any:
    """An HDF5 file opened for reading; SnapshotError when it is missing or damaged."""
    h5py = h5py_module()
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise SnapshotError(f"cannot read {path} as HDF5: {error}", hint="the file is missing, cut short or damaged") from error


def write_hdf5(path: Path, fill: Callable[[Any], object]) -> None:
    """Calls fill(file) on a new HDF5 file and puts it in the place of `path`, whole or not at all. SnapshotError when it cannot be written.

    The file is made in memory: the HDF5 library can crash, at the latest when the program ends, where it cannot write to a full disk.
    """
    with h5py_module().File(str(path), "w", driver="core", backing_store=False) as file:
        fill(file)
        file.flush()
        image = file.id.get_file_image()
    write_atomically(path, lambda out: out.write(image))


def read_model(path: str | Path) -> pb.NetParameter:
    """The groups data/LAYER/INDEX (and diff/LAYER/INDEX) of an HDF5 model as a NetParameter. SnapshotError for any other file."""
    groups, message = h5py_module().Group, pb.NetParameter()
    with open_hdf5(path) as file:
        try:
            data, diffs = file.get("data"), file.get("diff", {})
            if not isinstance(data, groups) or not all(isinstance(group, groups) for group in data.values()):
                hint = "images belong to a data layer, a .solverstate.h5 to --snapshot"
                raise SnapshotError(f"{path} has no group 'data' with a group for each layer: it is not a Caffe model", hint=hint)
            for name, group in data.items():
                _read_layer(message.layer.add(name=name), group, diffs.get(name, {}))
        except (AttributeError, KeyError, OSError, ValueError, TypeError, RuntimeError) as error:
            raise SnapshotError(f"{path} cannot be read as a Caffe model: {error}", hint="the file is damaged, or another program's") from error
    return message


def _read_layer(layer: pb.LayerParameter, group: Any, diffs: Any) -> None:
    last = max((int(key) for key in group), default=-1)
    if last >= MOST_BLOBS:
        raise ValueError(f"layer '{layer.name}' has a blob number {last}")
    for index in map(str, range(last + 1)):
        blob = layer.blobs.add()
        if index in group:  # else a shared parameter, saved with its owner
            diff = np.asarray(diffs[index], np.float32) if index in diffs else None
            array_to_blob(np.asarray(group[index], np.float32), blob, diff)


def write_model(net: Net, path: Path, diff: bool = False) -> None:
    """Writes data/LAYER/INDEX for every layer's own parameters, and diff/LAYER/INDEX for all when asked."""
    slashed = next((name for name in net.layer_names if "/" in name), None)
    if slashed:
        raise SnapshotError(f"layer name '{slashed}' has a slash, which HDF5 model files cannot hold", hint="use snapshot_format: BINARYPROTO")

    def fill(file: Any) -> None:
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

    write_hdf5(path, fill)
