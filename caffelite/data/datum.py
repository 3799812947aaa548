"""Decodes database records (Datum messages) into pixels and label.

The common record, raw 8-bit pixels, begins with the same bytes in every record of one size (fields 1..4 of Datum: sizes, then the
length of the data) and ends with the label. Comparing that beginning and looking the end up in a table replaces protobuf's
parser, which copies every pixel; any other record goes through the parser.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from caffelite.data.images import Pixels, decode_image, size_text
from caffelite.errors import DataError, Where
from caffelite.schema import parse_datum, pb

LARGEST_LABEL = 2**24  # beyond, float32 (a label blob's type) does not hold every whole number
_MOST_TAILS = 65536


class Record(NamedTuple):
    """pixels: (C,H,W), uint8 or float32 (Datum.float_data); possibly a view into the database. label: a class number."""

    pixels: Pixels
    label: int


class DatumDecoder:
    """Decodes records. channels: 3 or 1 converts encoded images to colour or gray (force_color, force_gray), None keeps them."""

    def __init__(self, channels: int | None = None) -> None:
        self.channels = channels
        self._prefix, self._shape, self._end = b"", (0, 0, 0), 0
        self._tails: dict[bytes, int] = {}

    def __call__(self, value: memoryview) -> Record:
        """The record in a database value. DataError (without its place) when it is damaged or of another kind."""
        start = len(self._prefix)
        if start and value[:start] == self._prefix:
            label = self._tails.get(bytes(value[self._end :]))
            if label is not None:
                return Record(np.frombuffer(value, np.uint8, self._end - start, start).reshape(self._shape), label)
        return self._parse(bytes(value))

    def _parse(self, value: bytes) -> Record:
        datum = parse_datum(value)
        if not -LARGEST_LABEL <= datum.label <= LARGEST_LABEL:
            raise DataError(f"its label {datum.label} is outside -{LARGEST_LABEL}..{LARGEST_LABEL}, which a float32 label blob can hold")
        if datum.encoded:
            return Record(decode_image(datum.data, self.channels), datum.label)
        return Record(self._raw(datum, value), datum.label)

    def _raw(self, datum: pb.Datum, value: bytes) -> Pixels:
        shape = (datum.channels, datum.height, datum.width)
        if min(shape) <= 0:
            raise DataError(f"its size is {size_text(shape)}, expected three positive numbers", hint="is this a database of images?")
        found = len(datum.data) or len(datum.float_data)
        if found != shape[0] * shape[1] * shape[2]:
            raise DataError(f"it says {size_text(shape)} but holds {found} values", hint="the database is damaged: convert the images again")
        if self.channels not in (None, shape[0]):
            raise DataError(f"it holds raw pixels of {shape[0]} channel(s), which force_color and force_gray cannot change", hint="convert the images again")
        if not datum.data:
            return np.array(datum.float_data, np.float32).reshape(shape)
        self._learn(shape, datum.label, value)
        return np.frombuffer(datum.data, np.uint8).reshape(shape)

    def _learn(self, shape: tuple[int, int, int], label: int, value: bytes) -> None:
        """Keeps the beginning and the end of a plain raw record for the records to come."""
        count = shape[0] * shape[1] * shape[2]
        prefix = b"\x08%b\x10%b\x18%b\x22%b" % tuple(_varint(number) for number in (*shape, count))
        tail = value[len(prefix) + count :]
        if not value.startswith(prefix) or not _only_label(tail):
            return
        if prefix != self._prefix or len(self._tails) >= _MOST_TAILS:
            self._prefix, self._shape, self._end, self._tails = prefix, shape, len(prefix) + count, {}
        self._tails[tail] = label


def record_name(key: bytes) -> str:
    """A record, named by its key."""
    return f"record '{key.decode('utf-8', 'backslashreplace')}'"


def placed(error: DataError, source: str, key: bytes) -> DataError:
    """The error of one record with its database and key."""
    return DataError(f"{record_name(key)}: {error.message}", where=Where(source), hint=error.hint)


def _only_label(tail: bytes) -> bool:
    rest = parse_datum(tail)
    return {field.name for field, _ in rest.ListFields()} <= {"label", "encoded"} and not rest.encoded


def _varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
