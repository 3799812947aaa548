"""Arrays in and out of BlobProto, at memory speed.

Iterating protobuf's repeated floats costs about 50 ns each (3 s for AlexNet), so the packed bytes are read and written directly:
a packed field of BlobProto is its tag, a length, and little-endian numbers (protobuf encoding, "Packed Repeated Fields").
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from caffelite import caffelite_pb2 as pb
from caffelite.blob import Shape
from caffelite.errors import SnapshotError

_VARINT, _LENGTH_DELIMITED, _GROUP_START = 0, 2, 3  # wire types
_LEGACY = ("num", "channels", "height", "width")
_FIELDS = {name: field.number for name, field in pb.BlobProto.DESCRIPTOR.fields_by_name.items()}
_FIXED_WIDTH = {1: 8, 5: 4}  # of these wire types: bytes
F32, F64 = np.dtype("<f4"), np.dtype("<f8")


def legacy_shape(blob: pb.BlobProto) -> bool:
    """True when the blob has the old num/channels/height/width, any of which overrides `shape`."""
    return any(blob.HasField(name) for name in _LEGACY)


def blob_shape(blob: pb.BlobProto) -> Shape:
    """The blob's shape; four axes for legacy fields, an absent one counting 0."""
    if legacy_shape(blob):
        return tuple(getattr(blob, name) for name in _LEGACY)
    return tuple(blob.shape.dim)


def blob_fits(blob: pb.BlobProto, shape: Shape) -> bool:
    """Whether the blob's shape is `shape`; old four-axis ones align from the last axis, with 1s before."""
    if legacy_shape(blob) and len(shape) <= 4:
        return blob_shape(blob) == (1,) * (4 - len(shape)) + tuple(shape)
    return blob_shape(blob) == tuple(shape)


def blob_to_array(blob: pb.BlobProto, diff: bool = False) -> npt.NDArray[np.float32]:
    """The values, or with `diff` the stored gradient, as float32 in C order and the blob's shape; doubles first if there are any.

    SnapshotError when their number does not fit the shape.
    """
    part = "diff" if diff else "data"
    wide = len(getattr(blob, "double_" + part)) > 0
    values = _packed(blob, "double_" + part, F64) if wide else _packed(blob, part, F32)
    shape = blob_shape(blob)
    if min(shape, default=0) < 0 or values.size != prod(shape):
        raise SnapshotError(f"a stored blob of shape {_shown(shape)} needs {prod(shape)} {part} values, found {values.size}", hint="the file is damaged")
    return np.array(values, np.float32).reshape(shape)


def _shown(shape: Shape) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


def _packed(blob: pb.BlobProto, name: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The values of a packed field, without a Python object per value."""
    wire = blob.SerializeToString()
    chunks = [np.frombuffer(wire, dtype, (end - start) // dtype.itemsize, start) for number, start, end in _spans(wire) if number == _FIELDS[name]]
    return np.concatenate(chunks) if len(chunks) > 1 else chunks[0] if chunks else np.empty(0, dtype)


def _spans(wire: bytes) -> Iterator[tuple[int, int, int]]:
    """Field number, start and end of every length-delimited field. `wire` is what protobuf itself just wrote."""
    position = depth = 0
    while position < len(wire):
        tag, position = _varint(wire, position)
        kind = tag & 7
        if kind == _LENGTH_DELIMITED:
            size, position = _varint(wire, position)
            if depth == 0:
                yield tag >> 3, position, position + size
            position += size
        elif kind in _FIXED_WIDTH:
            position += _FIXED_WIDTH[kind]
        elif kind == _VARINT:
            _, position = _varint(wire, position)
        else:  # a group (an unknown field kept by protobuf) opens or closes
            depth += 1 if kind == _GROUP_START else -1


def _varint(wire: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = wire[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def array_to_blob(array: npt.ArrayLike, blob: pb.BlobProto, diff: npt.ArrayLike | None = None) -> None:
    """Overwrites `blob` with the array's shape and its values as float32 in C order; `diff` (same shape) likewise.

    SnapshotError when `diff` has another shape, or when the values exceed the 2 GiB that protobuf can hold in one message.
    """
    values = np.asarray(array)
    parts = [(_FIELDS["data"], values)]
    if diff is not None:
        gradient = np.asarray(diff)
        if gradient.shape != values.shape:
            raise SnapshotError(f"a gradient of shape {_shown(gradient.shape)} does not fit data of shape {_shown(values.shape)}")
        parts.append((_FIELDS["diff"], gradient))
    if sum(4 * part.size for _, part in parts) >= 2**31 - 64:
        raise SnapshotError(f"a blob of shape {_shown(values.shape)} exceeds the 2 GiB that one protobuf message can hold")
    wire = pb.BlobProto(shape=pb.BlobShape(dim=values.shape)).SerializeToString()
    for number, part in parts:
        packed = np.ascontiguousarray(part, F32)
        wire = b"".join((wire, _varint_bytes(number << 3 | _LENGTH_DELIMITED), _varint_bytes(packed.nbytes), packed.data.cast("B") if packed.size else b""))
    blob.ParseFromString(wire)


def _varint_bytes(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
