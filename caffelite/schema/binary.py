"""Reads Caffe's binary files (.caffemodel, .solverstate, .binaryproto) and database records, with a clear error for every damage."""

from __future__ import annotations

import os
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, EncodeError, Message

from caffelite import caffelite_pb2 as pb
from caffelite.errors import CaffeliteError, DataError, SnapshotError, SpecError, Where
from caffelite.schema.fields import is_repeated
from caffelite.schema.places import SourceMap
from caffelite.schema.upgrade import upgrade_net

LARGEST = 2**31 - 1  # bytes of one protobuf message
_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_PROBE = 1024
_TOO_LARGE = "one protobuf file holds 2 GiB at most; write HDF5 instead"

M = TypeVar("M", bound=Message)


def read_caffemodel(path: str | os.PathLike[str]) -> pb.NetParameter:
    """The net stored in a binary .caffemodel, upgraded to the current form. SnapshotError when it cannot be read."""
    path = os.fspath(path)
    net = _read(path, pb.NetParameter(), "a .caffemodel")
    if not net.layer and not net.layers:
        raise SnapshotError("this .caffemodel holds no layers", where=Where(path), hint=_other_kind(path, "a .caffemodel"))
    try:
        upgrade_net(net, SourceMap(Where(path)), strict=False)
    except SpecError as error:
        raise SnapshotError(error.message, where=Where(path), layer=error.layer) from error
    return net


def read_solverstate(path: str | os.PathLike[str]) -> pb.SolverState:
    """The solver state in a binary .solverstate. SnapshotError when it cannot be read or records no iteration."""
    path = os.fspath(path)
    state = _read(path, pb.SolverState(), "a .solverstate")
    if not state.HasField("iter"):
        raise SnapshotError("this .solverstate records no iteration", where=Where(path), hint=_other_kind(path, "a .solverstate"))
    return state


def read_blob(path: str | os.PathLike[str]) -> pb.BlobProto:
    """The blob in a .binaryproto (a mean image, say). SnapshotError when it cannot be read or is empty."""
    path = os.fspath(path)
    blob = _read(path, pb.BlobProto(), "a .binaryproto")
    if not blob.data and not blob.double_data:
        raise SnapshotError("this .binaryproto holds no values", where=Where(path), hint=_other_kind(path, "a .binaryproto"))
    return blob


def parse_datum(data: bytes) -> pb.Datum:
    """One database record. DataError when it is not a Datum; the caller adds the database and the key."""
    datum = pb.Datum()
    try:
        datum.ParseFromString(data)
    except DecodeError as error:
        raise DataError(f"a record of {len(data)} bytes is not a Datum", hint="the database is damaged, or holds something else than images") from error
    return datum


def parse_blobs(data: bytes) -> list[pb.BlobProto]:
    """The blobs of a BlobProtoVector. SnapshotError when the bytes are none."""
    vector = pb.BlobProtoVector()
    try:
        vector.ParseFromString(data)
    except DecodeError as error:
        raise SnapshotError(f"{len(data)} bytes are not a BlobProtoVector") from error
    return list(vector.blobs)


def message_bytes(message: Message) -> bytes:
    """The message in binary. SnapshotError when it exceeds the 2 GiB that protobuf allows."""
    try:
        data = message.SerializeToString()
    except (EncodeError, ValueError, MemoryError) as error:
        raise SnapshotError(f"a {message.DESCRIPTOR.name} cannot be written: {error}", hint=_TOO_LARGE) from error
    if len(data) > LARGEST:
        raise SnapshotError(f"a {message.DESCRIPTOR.name} of {len(data)} bytes cannot be written", hint=_TOO_LARGE)
    return data


def open_failure(path: str, error: OSError, wanted: str, kind: type[CaffeliteError]) -> CaffeliteError:
    """The error for a file that cannot be opened or read."""
    if isinstance(error, FileNotFoundError):
        folder = os.path.dirname(path) or "."
        hint = f"is the path right, seen from {os.getcwd()}?" if os.path.isdir(folder) else f"the folder {folder} does not exist"
        return kind(f"no such file (expected {wanted})", where=Where(path), hint=hint)
    if isinstance(error, IsADirectoryError):
        return kind(f"this is a folder, expected {wanted}", where=Where(path))
    return kind(f"cannot be read: {error.strerror or error} (expected {wanted})", where=Where(path))


def _read(path: str, message: M, wanted: str) -> M:
    name = message.DESCRIPTOR.name
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > LARGEST:
                raise SnapshotError(f"{size} bytes are more than the {LARGEST} that protobuf can hold (expected {wanted})", where=Where(path))
            data = file.read()
    except (OSError, ValueError) as error:
        raise open_failure(path, error if isinstance(error, OSError) else OSError(str(error)), wanted, SnapshotError) from error
    if not data:
        raise SnapshotError(f"the file is empty, expected {wanted} (binary {name})", where=Where(path), hint="was it cut off by a full disk? take an older one")
    try:
        message.ParseFromString(data)
        _check_strings(message)
    except (DecodeError, UnicodeDecodeError) as error:
        raise SnapshotError(f"{_looks_like(data)}; expected {wanted} (binary {name})", where=Where(path), hint=_advice(path, data, wanted)) from error
    return message


def _check_strings(message: Any) -> None:
    """UnicodeDecodeError when a string is not text; protobuf would hand it out as bytes."""
    for field, value in message.ListFields():
        values = value if is_repeated(field) else [value]
        if field.type == FieldDescriptor.TYPE_STRING:
            for text in values:
                if isinstance(text, bytes):
                    text.decode("utf-8")
        elif field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type.name != "BlobProto":
            for child in values:
                _check_strings(child)


def _looks_like(data: bytes) -> str:
    if data.startswith(_HDF5_SIGNATURE):
        return "the file is HDF5"
    if _is_text(data):
        return "the file is text"
    return f"the file of {len(data)} bytes is damaged or of another kind"


def _is_text(data: bytes) -> bool:
    probe = data[:_PROBE]
    return all(byte >= 32 or byte in b"\t\n\r\f" for byte in probe) and not any(byte == 127 for byte in probe) and max(probe) < 128


def _advice(path: str, data: bytes, wanted: str) -> str:
    if data.startswith(_HDF5_SIGNATURE):
        return "name HDF5 files with .h5 at the end"
    if _is_text(data):
        return "a prototxt describes a net or a solver; weights and states are binary files"
    return _other_kind(path, wanted) or "it may have been cut off while it was written; take an older one"


def _other_kind(path: str, wanted: str) -> str | None:
    for ending, what in ((".solverstate", "a solver state"), (".caffemodel", "a net's weights"), (".binaryproto", "a mean image")):
        if path.endswith(ending) and not wanted.endswith(ending):
            twin = path.removesuffix(ending) + wanted.removeprefix("a ")
            return f"its name says that it is {what}" + (f": did you mean {twin}?" if os.path.isfile(twin) else "")
    return None
