"""Weights between nets and files: copying by layer name (spec net-and-solver 4), .caffemodel and HDF5."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from caffelite.blob import Shape
from caffelite.errors import SnapshotError
from caffelite.files import write_atomically
from caffelite.schema import array_to_blob, blob_to_array, legacy_shape, message_bytes, pb, read_caffemodel

if TYPE_CHECKING:
    from caffelite.net import Net

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


def is_hdf5(path: str | Path) -> bool:
    """Whether a file starts with HDF5's signature; False for one that cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(8) == HDF5_SIGNATURE
    except OSError:
        return False


def read_weights(path: str | Path) -> pb.NetParameter:
    """A weights file as a NetParameter: a binary .caffemodel (any age) or Caffe's HDF5 layout, told by its first bytes."""
    if is_hdf5(path):
        from caffelite.hdf5 import read_model

        return read_model(path)
    return read_caffemodel(path)


def write_weights(net: Net, path: Path, diff: bool = False) -> None:
    """Writes a net's weights atomically; HDF5 when the name ends in .h5."""
    if path.suffix == ".h5":
        from caffelite.hdf5 import write_model

        write_model(net, path, diff)
    else:
        write_atomically(path, lambda file: file.write(message_bytes(net_to_proto(net, diff))))


def copy_weights(source: pb.NetParameter, net: Net, name: str) -> list[str]:
    """Copies each source layer's blobs into the first layer of the same name; returns the source layers that found none.

    SnapshotError when the numbers of blobs or their shapes differ. `name` says where the source came from.
    """
    targets: dict[str, Any] = {}
    for step in net.steps:
        targets.setdefault(step.layer.name, step)
    ignored: list[str] = []
    for layer in source.layer:
        if layer.name not in targets:
            ignored.append(layer.name)
            continue
        step = targets[layer.name]
        params, blobs = step.layer.params, list(layer.blobs)
        shared = [info.owner is not info for info in step.node.params]
        while len(blobs) < len(params) and shared[len(blobs)]:  # HDF5 files leave shared parameters out
            blobs.append(pb.BlobProto())
        if len(blobs) != len(params):
            raise SnapshotError(
                f"{name} has {len(layer.blobs)} parameter blob(s) for this layer, the net has {len(params)}",
                layer=layer.name,
                hint="rename the layer to leave it out of the copy",
            )
        for index, (blob, param) in enumerate(zip(blobs, params)):
            if shared[index] and not blob.ByteSize():
                continue
            net.backend.from_host(_fitted(blob, param.shape, layer.name, index, name), param.master)
            if param.diff is not None and (blob.diff or blob.double_diff):
                net.backend.from_host(blob_to_array(blob, diff=True).reshape(param.shape), param.diff)
    return ignored


def _fitted(blob: pb.BlobProto, shape: Shape, layer: str, index: int, name: str) -> np.ndarray:
    values = blob_to_array(blob)
    legacy = legacy_shape(blob) and len(shape) <= 4
    fits = values.shape == ((1,) * (4 - len(shape)) + shape if legacy else shape)
    if not fits:
        raise SnapshotError(
            f"{name} has shape {values.shape} for parameter {index}, the net has {shape}",
            layer=layer,
            hint="to train this layer from its filler instead, give it another name",
        )
    return values.reshape(shape)


def net_to_proto(net: Net, diff: bool = False) -> pb.NetParameter:
    """The running net as Caffe saves it: every layer (inserted Splits too) as in effect, with its blobs."""
    message = pb.NetParameter(name=net.name)
    for step in net.steps:
        layer = message.layer.add()
        layer.CopyFrom(step.layer.param)
        del layer.blobs[:], layer.loss_weight[:]
        if any(step.node.loss_weights):
            layer.loss_weight.extend(step.node.loss_weights)
        for info in step.node.params:
            if not info.spec.learned and info.index >= len(layer.param):
                layer.param.add(lr_mult=0.0)
        for param in step.layer.params:
            grad = net.backend.to_host(param.diff) if diff and param.diff is not None else None
            array_to_blob(net.backend.to_host(param.master), layer.blobs.add(), grad)
    return message
