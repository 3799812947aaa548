"""Binary files and the arrays in them: what Caffe writes is read, what we write Caffe reads, and damage is named."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import EncodeError

from caffelite.errors import CaffeliteError, DataError, SnapshotError, Where
from caffelite.schema import array_to_blob, blob_to_array, legacy_shape, message_bytes, parse_datum, pb, read_blob, read_caffemodel, read_solverstate
from caffelite.schema.blobs import blob_shape


def test_blob_holds_shape_and_packed_floats() -> None:
    blob = pb.BlobProto()
    array_to_blob(np.array([[1, 2, 3], [4, 5, 6.5]]), blob, diff=np.arange(6).reshape(2, 3))
    assert blob == pb.BlobProto(shape=pb.BlobShape(dim=[2, 3]), data=[1, 2, 3, 4, 5, 6.5], diff=[0, 1, 2, 3, 4, 5])
    # By hand after protobuf's encoding page: field 7 (shape) holds packed field 1, field 5 and 6 are packed floats.
    expected = b"\x2a\x18" + struct.pack("<6f", 1, 2, 3, 4, 5, 6.5) + b"\x32\x18" + struct.pack("<6f", *range(6)) + b"\x3a\x04\x0a\x02\x02\x03"
    assert blob.SerializeToString(deterministic=True) == expected


def test_array_to_blob_replaces_what_was_there() -> None:
    blob = pb.BlobProto(num=3, data=[1, 2], double_data=[1])
    array_to_blob(np.float32(7), blob)
    assert blob == pb.BlobProto(shape=pb.BlobShape(), data=[7])


@pytest.mark.parametrize("shape", [(), (1,), (7,), (0, 3), (32,), (4096,), (2, 3, 5), (1, 2, 3, 4, 5)])
def test_round_trip(shape: tuple[int, ...]) -> None:
    array = np.asarray(np.random.default_rng(0).standard_normal(shape), np.float32)
    blob = pb.BlobProto()
    array_to_blob(array, blob, diff=-array)
    again = pb.BlobProto.FromString(blob.SerializeToString())
    assert list(again.shape.dim) == list(shape)
    for diff, values in ((False, array), (True, -array)):
        read = blob_to_array(again, diff=diff)
        assert read.shape == shape
        assert read.dtype == np.float32
        assert read.flags.c_contiguous
        assert read.flags.writeable
        np.testing.assert_array_equal(read, values)


def test_strided_and_big_endian_arrays_are_written_in_c_order() -> None:
    array = np.arange(24, dtype=">f8").reshape(2, 3, 4).transpose(2, 0, 1)
    blob = pb.BlobProto()
    array_to_blob(array, blob)
    assert list(blob.data) == [float(value) for value in array.ravel()]


def test_legacy_shape_overrides_and_absent_sizes_count_zero() -> None:
    blob = pb.BlobProto(num=1, channels=2, height=1, width=3, shape=pb.BlobShape(dim=[6]), data=range(6))
    assert legacy_shape(blob)
    np.testing.assert_array_equal(blob_to_array(blob), np.arange(6, dtype=np.float32).reshape(1, 2, 1, 3))
    assert blob_shape(pb.BlobProto(width=5)) == (0, 0, 0, 5)
    assert not legacy_shape(pb.BlobProto(shape=pb.BlobShape(dim=[6])))


def test_doubles_come_first() -> None:
    blob = pb.BlobProto(shape=pb.BlobShape(dim=[2]), data=[1, 2], double_data=[3, 4.5], double_diff=[5, 6])
    np.testing.assert_array_equal(blob_to_array(blob), np.float32([3, 4.5]))
    np.testing.assert_array_equal(blob_to_array(blob, diff=True), np.float32([5, 6]))


def test_unpacked_values_and_unknown_fields_are_read() -> None:
    unpacked = b"".join(b"\x2d" + struct.pack("<f", value) for value in (1, 2))
    # Field 20: varint, 8 bytes, bytes, 4 bytes; field 21: a group that holds a field numbered like data.
    unknown = b"\xa0\x01\x96\x01" + b"\xa1\x01" + bytes(8) + b"\xa2\x01\x03abc" + b"\xa5\x01" + bytes(4) + b"\xab\x01\x2a\x04\x00\x00\x80\x3f\xac\x01"
    blob = pb.BlobProto.FromString(unknown + b"\x3a\x03\x0a\x01\x02" + unpacked)
    np.testing.assert_array_equal(blob_to_array(blob), np.float32([1, 2]))


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (pb.BlobProto(shape=pb.BlobShape(dim=[2, 3]), data=[1] * 5), r"shape \(2, 3\) needs 6 data values, found 5"),
        (pb.BlobProto(shape=pb.BlobShape(dim=[-1, -2]), data=[1, 2]), r"shape \(-1, -2\)"),
        (pb.BlobProto(data=[1, 2]), r"shape \(\) needs 1 data values, found 2"),
        (pb.BlobProto(num=2, data=[1, 2]), r"shape \(2, 0, 0, 0\) needs 0"),
    ],
)
def test_count_must_fit_shape(blob: pb.BlobProto, message: str) -> None:
    with pytest.raises(SnapshotError, match=message):
        blob_to_array(blob)


def test_gradient_of_another_shape_is_refused() -> None:
    with pytest.raises(SnapshotError, match=r"gradient of shape \(3\) does not fit data of shape \(2\)"):
        array_to_blob(np.zeros(2), pb.BlobProto(), diff=np.zeros(3))


def test_blob_beyond_protobufs_limit_is_refused() -> None:
    with pytest.raises(SnapshotError, match="exceeds the 2 GiB"):
        array_to_blob(np.broadcast_to(np.float32(0), (2**29,)), pb.BlobProto())


def test_message_beyond_protobufs_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Large:
        DESCRIPTOR = pb.NetParameter.DESCRIPTOR

        def SerializeToString(self) -> bytes:
            raise EncodeError("too big")

    message: Any = Large()
    with pytest.raises(SnapshotError, match="a NetParameter cannot be written: too big") as caught:
        message_bytes(message)
    assert "HDF5" in (caught.value.hint or "")


# --- files ---

Reader = Callable[[Path], Any]
READERS: list[tuple[Reader, str, bytes]] = [
    (read_caffemodel, ".caffemodel", pb.NetParameter(name="n", layer=[pb.LayerParameter(name="a", blobs=[pb.BlobProto(data=[1, 2])])]).SerializeToString()),
    (read_solverstate, ".solverstate", pb.SolverState(iter=3, learned_net="n.caffemodel", history=[pb.BlobProto(data=[1] * 9)]).SerializeToString()),
    (read_blob, ".binaryproto", pb.BlobProto(shape=pb.BlobShape(dim=[3]), data=[1, 2, 3]).SerializeToString()),
]


@pytest.fixture(params=READERS, ids=[ending for _, ending, _ in READERS])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Reader, Path, bytes]:
    read, ending, data = request.param
    return read, tmp_path / f"file{ending}", data


Case = tuple[Reader, Path, bytes]


def test_whole_files_are_read(case: Case) -> None:
    read, path, data = case
    path.write_bytes(data)
    assert read(path).SerializeToString() == data


def test_missing_empty_and_folder(case: Case) -> None:
    read, path, _ = case
    with pytest.raises(SnapshotError, match="no such file") as caught:
        read(path)
    assert caught.value.where == Where(str(path))
    path.write_bytes(b"")
    with pytest.raises(SnapshotError, match=rf"the file is empty, expected a \{path.suffix}"):
        read(path)
    with pytest.raises(SnapshotError, match=rf"folder, expected a \{path.suffix}"):
        read(path.parent)


def test_truncated_anywhere_never_raises_anything_else(case: Case) -> None:
    read, path, data = case
    refused = 0
    for end in range(1, len(data)):
        path.write_bytes(data[:end])
        try:
            read(path)
        except SnapshotError as error:
            refused += str(path) in str(error)
    assert refused > len(data) // 2


def test_cut_in_the_middle_says_size_and_what_to_do(case: Case) -> None:
    read, path, data = case
    path.write_bytes(data[:-1])
    with pytest.raises(SnapshotError, match=f"the file of {len(data) - 1} bytes is damaged or of another kind; expected") as caught:
        read(path)
    assert "take an older one" in (caught.value.hint or "")


def test_garbage_never_raises_anything_else(case: Case) -> None:
    read, path, data = case
    rng = random.Random(0)
    for number in range(300):
        junk = bytearray(data) if number % 2 else bytearray(rng.randbytes(rng.randint(1, 60)))
        for _ in range(rng.randint(1, 4)):
            junk[rng.randrange(len(junk))] = rng.randrange(256)
        path.write_bytes(junk)
        try:
            read(path)
        except CaffeliteError as error:
            assert isinstance(error, SnapshotError)  # noqa: PT017


def test_text_and_hdf5_are_named(case: Case) -> None:
    read, path, _ = case
    path.write_text('name: "net"\nlayer { name: "x" }\n')
    with pytest.raises(SnapshotError, match="the file is text; expected"):
        read(path)
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(SnapshotError, match="the file is HDF5; expected") as caught:
        read(path)
    assert ".h5" in (caught.value.hint or "")


def test_strings_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "n.caffemodel"
    path.write_bytes(b"\xa2\x06\x04\x0a\x02\xff\xfe")  # layer { name: "\xff\xfe" }
    with pytest.raises(SnapshotError, match="damaged"):
        read_caffemodel(path)


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.solverstate"
    path.write_bytes(pb.SolverState(iter=3).SerializeToString())
    with pytest.raises(SnapshotError, match="holds no layers") as caught:
        read_caffemodel(path)
    assert caught.value.hint == "its name says that it is a solver state"
    twin = tmp_path / "x.caffemodel"
    twin.touch()
    with pytest.raises(SnapshotError, match="holds no layers") as caught:
        read_caffemodel(path)
    assert caught.value.hint == f"its name says that it is a solver state: did you mean {twin}?"
    path.write_bytes(pb.SolverState(learned_net="x").SerializeToString())
    with pytest.raises(SnapshotError, match="records no iteration"):
        read_solverstate(path)
    path.write_bytes(pb.BlobProto(num=1).SerializeToString())
    with pytest.raises(SnapshotError, match="holds no values"):
        read_blob(path)


def test_datum() -> None:
    datum = pb.Datum(channels=3, height=1, width=2, data=b"abcdef", label=7)
    assert parse_datum(datum.SerializeToString()) == datum
    with pytest.raises(DataError, match="a record of 3 bytes is not a Datum"):
        parse_datum(b"\x22\x7fa")
