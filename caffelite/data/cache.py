"""DeviceCache: all images of a database, decoded, in a device's memory (cache: DEVICE)."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from math import prod
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np

from caffelite.backends.contract import Backend
from caffelite.data.datum import DatumDecoder, placed
from caffelite.data.lmdb_source import Database, data_file
from caffelite.data.transformer import Fail
from caffelite.errors import BackendError, DataError

_CHUNK = 1 << 24  # bytes of images that are copied at once
_FIELD = ("data_param", "cache")
_WITHOUT = "remove cache: DEVICE; images then travel to the GPU batch by batch"

_caches: WeakKeyDictionary[Any, WeakValueDictionary[tuple[Any, ...], DeviceCache]] = WeakKeyDictionary()


class DeviceCache:
    """planes (R*C,H,W) uint8 in the memory of `ops`, as Backend.transform takes them; labels (R) float32 on the host; image (C,H,W).

    channels: as for DatumDecoder. SpecError, made by `fail`, when the images are not all bytes of one size; BackendError when they do not
    fit into the memory; DataError for a record that cannot be read.
    """

    def __init__(self, ops: Backend, database: Database, channels: int | None, fail: Fail) -> None:
        self._decode, self._path, self._fail = DatumDecoder(channels), database.path, fail
        with closing(database.reader()) as reader:
            self.image = self._first(next(reader.read([0], ordered=True)))
            size = prod(self.image)
            self.nbytes = database.count * size
            self.labels = np.empty(database.count, np.float32)
            flat = self._allocate(ops)
            per_chunk = max(1, _CHUNK // size)
            for start in range(0, database.count, per_chunk):
                count = min(per_chunk, database.count - start)
                chunk = np.empty((count, *self.image), np.uint8)
                for i, (key, value) in enumerate(reader.read(range(start, start + count), ordered=True)):
                    chunk[i], self.labels[start + i] = self._record(key, value)
                ops.from_host(chunk.reshape(-1), ops.view(flat, start * size, (count * size,), "uint8"))
        self.planes = ops.view(flat, 0, (database.count * self.image[0], *self.image[1:]), "uint8")

    def _first(self, record: tuple[bytes, memoryview]) -> tuple[int, int, int]:
        channels, height, width = self._decoded(*record)[0].shape
        return channels, height, width

    def _allocate(self, ops: Backend) -> Any:
        try:
            return ops.allocate(self.nbytes)
        except BackendError as error:
            place = self._fail("", *_FIELD)
            message = f"cache: DEVICE needs {self} of {self._path}: {error.message}"
            raise BackendError(message, where=place.where, layer=place.layer, hint=_WITHOUT) from error

    def _decoded(self, key: bytes, value: memoryview) -> tuple[Any, int]:
        try:
            return self._decode(value)
        except DataError as error:
            raise placed(error, self._path, key) from error

    def _record(self, key: bytes, value: memoryview) -> tuple[Any, int]:
        pixels, label = self._decoded(key, value)
        if pixels.shape != self.image or pixels.dtype != np.uint8:
            kind = "an 8-bit" if pixels.dtype == np.uint8 else "a float"
            found = f"record '{key.decode('utf-8', 'backslashreplace')}' of {self._path} is {kind} image of {_times(pixels.shape)}"
            wanted = f"cache: DEVICE takes 8-bit images of one size, here {_times(self.image)} as the first record"
            raise self._fail(f"{found}; {wanted}", *_FIELD, hint=f"resize all when converting, or {_WITHOUT}")
        return pixels, label

    def __str__(self) -> str:
        return f"{self.nbytes / 2**20:,.1f} MB for the {len(self.labels):,} images ({_times(self.image)})"


def device_cache(ops: Backend, database: Database, channels: int | None, fail: Fail, tell: Callable[[str], object]) -> DeviceCache:
    """The cache of a database on a device, the same for all that ask for it while one of them holds it. What a new one takes is told."""
    status = os.stat(data_file(database.path))
    key = (status.st_dev, status.st_ino, status.st_mtime_ns, channels)
    held = _caches.setdefault(ops, WeakValueDictionary())
    cache = held.get(key)
    if cache is None:
        cache = held[key] = DeviceCache(ops, database, channels, fail)
        tell(f"cache: DEVICE holds {cache} of {database.path} in the GPU's memory")
    return cache


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
