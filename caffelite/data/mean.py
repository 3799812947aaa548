"""The mean image of a database, and its file as Caffe's compute_image_mean writes it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from caffelite.data.datum import DatumDecoder, placed
from caffelite.data.images import Pixels, size_text
from caffelite.data.lmdb_source import Database
from caffelite.errors import DataError, Where
from caffelite.files import write_atomically
from caffelite.schema import array_to_blob, message_bytes, pb

_CHUNK = 128  # records added up together; at most 2**24 8-bit values fit a uint32 sum


def compute_mean(database: str | os.PathLike[str], progress: Callable[[int, int], object] | None = None) -> npt.NDArray[np.float32]:
    """The mean of all records of an LMDB, (C,H,W) float32, in the order of their planes (blue first when made from colour images).

    Encoded records are decoded as they are stored. Sums are exact (integers) for 8-bit records and float64 for others; Caffe's tool
    adds in float32, which differs from about the sixth digit on. progress(done, total) is called now and then.
    DataError when the database cannot be read, is empty, or its records differ in size.
    """
    path = os.fspath(database)
    with Database(path) as source:
        if source.count == 0:
            raise DataError("the database holds no records", where=Where(path), hint="convert the images again")
        reader = source.reader()
        try:
            return _mean(reader, source.count, path, progress or _quiet)
        finally:
            reader.close()


def _quiet(done: int, total: int) -> None:
    """No progress wanted."""


def _mean(reader: Any, count: int, path: str, progress: Callable[[int, int], object]) -> npt.NDArray[np.float32]:
    decode = DatumDecoder()
    shape: tuple[int, ...] = ()
    total: npt.NDArray[np.float64] = np.zeros(0)
    for start in range(0, count, _CHUNK):
        records = reader.read(range(start, min(start + _CHUNK, count)), ordered=True)
        chunk = [_pixels(decode, key, value, path) for key, value in records]
        if start == 0:
            shape = chunk[0].shape
            total = np.zeros(shape)
        for i, pixels in enumerate(chunk):
            if pixels.shape != shape:
                message = f"record number {start + i} is {size_text(pixels.shape)}, the first one {size_text(shape)}"
                raise DataError(message, where=Where(path), hint="resize all images when converting")
        _add(chunk, total)
        progress(start + len(chunk), count)
    return (total / count).astype(np.float32)


def _pixels(decode: DatumDecoder, key: bytes, value: memoryview, path: str) -> Pixels:
    try:
        return decode(value).pixels
    except DataError as error:
        raise placed(error, path, key) from error


def _add(chunk: list[Pixels], total: npt.NDArray[np.float64]) -> None:
    """Adds images to the total; bytes as integers first, which is faster and as exact (float64 holds the sum of 2**45 of them)."""
    if all(pixels.dtype == np.uint8 for pixels in chunk):
        part = np.zeros(total.shape, np.uint32)
        for pixels in chunk:
            part += pixels
        total += part
    else:
        total += np.sum(chunk, axis=0, dtype=np.float64)


def channel_means(mean: npt.NDArray[np.float32]) -> list[float]:
    """The mean of each channel of a mean image, as for mean_value."""
    return [float(plane.mean(dtype=np.float64)) for plane in mean]


def write_mean(mean: npt.NDArray[np.float32], path: str | os.PathLike[str]) -> None:
    """Writes a (C,H,W) mean image as a .binaryproto with Caffe's legacy dimensions. SnapshotError when the file cannot be written."""
    channels, height, width = mean.shape
    blob = pb.BlobProto()
    array_to_blob(mean, blob)
    blob.ClearField("shape")
    blob.num, blob.channels, blob.height, blob.width = 1, channels, height, width
    content = message_bytes(blob)
    write_atomically(Path(path), lambda file: file.write(content))
