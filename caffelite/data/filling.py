"""What the prefetch thread does: reads, decodes, and transforms or gathers batch after batch, from a position on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from caffelite.data.cache import DeviceCache
from caffelite.data.datum import DatumDecoder, placed
from caffelite.data.images import Pixels
from caffelite.data.lmdb_source import Database
from caffelite.data.order import Order, words_at
from caffelite.data.raw import RawBatch
from caffelite.data.transformer import ItemError, Transformer
from caffelite.errors import DataError


class Batch:
    """Memory for one transformed batch: data (N,H,W,C) in the wanted type and labels (N)."""

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.data: npt.NDArray[Any] = np.zeros(shape, dtype)
        self.labels = np.zeros(shape[0], np.float32)

    def store(self, items: Sequence[Pixels], words: npt.NDArray[np.uint64], transformer: Transformer) -> None:
        """Takes the images; see Transformer.apply for the words and the errors."""
        transformer.apply(items, words, self.data)


class Filler:
    """Fills batches one after another from a position on. DataError for a record that cannot be used, with the database and the key."""

    def __init__(self, database: Database, order: Order, transformer: Transformer, position: int) -> None:
        self.database, self.order, self.transformer = database, order, transformer
        self.position = position
        self._reader = database.reader()
        self._decode = DatumDecoder(transformer.channels)

    def fill(self, batch: Batch | RawBatch) -> None:
        """Fills one batch and moves on behind it."""
        order, count = self.order, len(batch.labels)
        items, keys = [], []
        for i, (key, value) in enumerate(self._reader.read(order.numbers(self.position, count), not order.shuffle)):
            try:
                pixels, batch.labels[i] = self._decode(value)
            except DataError as error:
                raise placed(error, self.database.path, key) from error
            items.append(pixels)
            keys.append(key)
        try:
            batch.store(items, words_at(order.seed, order.stream, self.position, count), self.transformer)
        except ItemError as error:
            raise placed(error, self.database.path, keys[error.index]) from error
        self.position += count


class CachedFiller:
    """The same where the device has all images: batches are the numbers of records, their places and labels."""

    def __init__(self, cache: DeviceCache, order: Order, transformer: Transformer, position: int) -> None:
        self.cache, self.order, self.transformer = cache, order, transformer
        self.position = position

    def fill(self, batch: RawBatch) -> None:
        """Fills one batch and moves on behind it."""
        order, count = self.order, len(batch.labels)
        numbers = order.numbers(self.position, count)
        batch.labels[:] = self.cache.labels[numbers]
        batch.place(numbers, words_at(order.seed, order.stream, self.position, count), self.transformer)
        self.position += count
