"""DeviceCache: all images of a database, decoded, in a device's memory (cache: DEVICE)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from math import prod
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
import numpy.typing as npt

from caffelite.backends.contract import Array, Backend
from caffelite.data.datum import DatumDecoder, Record, placed, record_name
from caffelite.data.images import size_text
from caffelite.data.lmdb_source import Database
from caffelite.data.transformer import Fail
from caffelite.errors import BackendError, DataError

_CHUNK = 1 << 24  # bytes of images that are copied at once
_FIELD = ("data_param", "cache")
_WITHOUT = "remove cache: DEVICE; images then travel to the GPU batch by batch"

_caches: WeakKeyDictionary[Any, WeakValueDictionary[tuple[Any, ...], DeviceCache]] = WeakKeyDictionary()


@dataclass(eq=False)
class DeviceCache:
    """planes (R*C,H,W) uint8 in a backend's memory, as Backend.transform takes them; labels (R) float32 on the host; image (C,H,W)."""

    image: tuple[int, int, int]
    planes: Array
    labels: npt.NDArray[np.float32]


def device_cache(ops: Backend, database: Database, channels: int | None, fail: Fail, tell: Callable[[str], object]) -> DeviceCache:
    """The cache of a database on a device, the same for all that ask for it while one of them holds it. What a new one takes is told.

    channels: as for DatumDecoder. SpecError, made by `fail`, when the images are not all bytes of one size; BackendError when they do not
    fit into the memory; DataError for a record that cannot be read.
    """
    held = _caches.setdefault(ops, WeakValueDictionary())
    cache = held.get((*database.identity, channels))
    if cache is None:
        loader = _Loader(database, channels, fail)
        cache = held[(*database.identity, channels)] = loader.load(ops)
        tell(f"cache: DEVICE holds {loader.size} of {database.path} in the GPU's memory")
    return cache


class _Loader:
    """Reads and decodes a database into a device's memory."""

    def __init__(self, database: Database, channels: int | None, fail: Fail) -> None:
        self._database, self._decode, self._fail = database, DatumDecoder(channels), fail
        self.image, self.nbytes = (0, 0, 0), 0

    def load(self, ops: Backend) -> DeviceCache:
        """All of it, some images at once."""
        count = self._database.count
        with closing(self._database.reader()) as reader:
            self.image = self._decoded(*next(reader.read([0], ordered=True)))[0].shape
            self.nbytes = count * prod(self.image)
            flat, labels = self._allocate(ops), np.empty(count, np.float32)
            at_once = max(1, _CHUNK // prod(self.image))
            for start in range(0, count, at_once):
                numbers = range(start, min(start + at_once, count))
                chunk = np.empty((len(numbers), *self.image), np.uint8)
                for i, record in enumerate(reader.read(numbers, ordered=True)):
                    chunk[i], labels[start + i] = self._checked(*record)
                ops.from_host(chunk.reshape(-1), ops.view(flat, start * prod(self.image), (chunk.size,), "uint8"))
        planes = ops.view(flat, 0, (count * self.image[0], *self.image[1:]), "uint8")
        return DeviceCache(self.image, planes, labels)

    @property
    def size(self) -> str:
        """In words."""
        return f"{self.nbytes / 2**20:,.1f} MB for the {self._database.count:,} images ({size_text(self.image)})"

    def _allocate(self, ops: Backend) -> Array:
        try:
            return ops.allocate(self.nbytes)
        except BackendError as error:
            place = self._fail("", *_FIELD)
            message = f"cache: DEVICE needs {self.size} of {self._database.path}: {error.message}"
            raise BackendError(message, where=place.where, layer=place.layer, hint=_WITHOUT) from error

    def _decoded(self, key: bytes, value: memoryview) -> Record:
        try:
            return self._decode(value)
        except DataError as error:
            raise placed(error, self._database.path, key) from error

    def _checked(self, key: bytes, value: memoryview) -> Record:
        record = self._decoded(key, value)
        shape, is_bytes = record.pixels.shape, record.pixels.dtype == np.uint8
        if shape != self.image or not is_bytes:
            kind = "an 8-bit" if is_bytes else "a float"
            found = f"{record_name(key)} of {self._database.path} is {kind} image of {size_text(shape)}"
            wanted = f"cache: DEVICE takes 8-bit images of one size, here {size_text(self.image)} as the first record"
            raise self._fail(f"{found}; {wanted}", *_FIELD, hint=f"resize all when converting, or {_WITHOUT}")
        return record
