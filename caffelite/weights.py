"""Weights between nets and files: copying by layer name, .caffemodel and HDF5."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from caffelite.blob import Param, Shape
from caffelite.errors import SnapshotError
from caffelite.files import write_atomically
from caffelite.graph import AUTOMATIC
from caffelite.schema import array_to_blob, blob_fits, blob_shape, blob_to_array, message_bytes, pb, read_caffemodel

if TYPE_CHECKING:
    from caffelite.net import Net, Step

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
        write_binary(net, path, diff)


def write_binary(net: Net, path: Path, diff: bool = False) -> None:
    """Writes a net's weights atomically as a .caffemodel."""
    write_atomically(path, lambda file: file.write(message_bytes(net_to_proto(net, diff))))


def copy_weights(source: pb.NetParameter, net: Net, name: str) -> list[str]:
    """Copies each source layer's blobs into the first layer of the same name; returns the source layers that found none.

    SnapshotError, and nothing copied, when the numbers of blobs or their shapes differ, or when no weights find a place at all.
    `name` says where the source came from.
    """
    targets: dict[str, Step] = {}
    for step in net.steps:
        targets.setdefault(step.layer.name, step)
    copies = [pair for layer in source.layer if layer.name in targets for pair in _matched(layer, targets[layer.name], name)]
    weighted = [layer.name for layer in source.layer if layer.blobs]
    if weighted and net.params and not copies:
        raise SnapshotError(
            f"{name} has no weights for any layer of the net: it has {_some(weighted)}, the net has {_some(list(net.params))}",
            hint="layers are matched by name; Caffe would go on and leave the net as it was",
        )
    for blob, param in copies:
        net.backend.from_host(blob_to_array(blob).reshape(param.shape), param.master)
        if param.diff is not None and (blob.diff or blob.double_diff):
            net.backend.from_host(blob_to_array(blob, diff=True).reshape(param.shape), param.diff)
    net.copied.update(layer.name for layer in source.layer if layer.name in targets)
    return [layer.name for layer in source.layer if layer.name not in targets]


def left_to_fillers(net: Net) -> str | None:
    """Which layers of a net have parameters of their own and found no weights in any copy, for a warning; None if all did."""
    owners = [step.layer.name for step in net.steps if any(info.owner is info for info in step.node.params)]
    left = [layer for layer in owners if layer not in net.copied]
    return f"no weights for {_some(left)}: left to the filler" if left else None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _matched(layer: pb.LayerParameter, step: Step, name: str) -> list[tuple[pb.BlobProto, Param]]:
    """The layer's blobs, each with the parameter that it fits."""
    params, blobs = step.layer.params, list(layer.blobs)
    shared = [info.owner is not info for info in step.node.params]
    while len(blobs) < len(params) and shared[len(blobs)]:  # HDF5 files leave shared parameters to their owners
        blobs.append(pb.BlobProto())
    if len(blobs) != len(params):
        raise SnapshotError(
            f"{name} has {len(layer.blobs)} parameter blob(s) for this layer, the net has {len(params)}",
            layer=layer.name,
            hint="rename the layer to leave it out of the copy",
        )
    pairs = []
    for index, (blob, param) in enumerate(zip(blobs, params)):
        if blob.ByteSize() or not shared[index]:
            _check_fit(blob, param.shape, index, layer.name, name)
            pairs.append((blob, param))
    return pairs


def _check_fit(blob: pb.BlobProto, shape: Shape, index: int, layer: str, name: str) -> None:
    if not blob_fits(blob, shape):
        raise SnapshotError(
            f"{name} has shape {blob_shape(blob)} for parameter {index}, the net has {shape}",
            layer=layer,
            hint="to train this layer from its filler instead, give it another name",
        )
    for count in (len(blob.double_data) or len(blob.data), len(blob.double_diff) or len(blob.diff) or prod(shape)):
        if count != prod(shape):
            raise SnapshotError(f"{name} holds {count} values for parameter {index} of shape {shape}", layer=layer, hint="the file is damaged")


def net_to_proto(net: Net, diff: bool = False) -> pb.NetParameter:
    """The running net as Caffe saves it: every layer (inserted Splits too) as in effect, with its blobs."""
    message = pb.NetParameter(name=net.name)
    for step in net.steps:
        layer = message.layer.add()
        layer.CopyFrom(step.layer.param)
        del layer.blobs[:], layer.loss_weight[:], layer.top[:]
        layer.top.extend(top for top in step.layer.param.top if not top.startswith(AUTOMATIC))
        if any(step.node.loss_weights) or step.layer.is_loss:
            layer.loss_weight.extend(step.node.loss_weights)
        for info in step.node.params:
            if not info.spec.learned and info.index >= len(layer.param):
                layer.param.add(lr_mult=0.0)
        for param in step.layer.params:
            grad = net.backend.to_host(param.diff) if diff and param.diff is not None else None
            array_to_blob(net.backend.to_host(param.master), layer.blobs.add(), grad)
    return message
