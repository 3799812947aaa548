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
from caffelite.data.order import Order, warp_words_at, words_at
from caffelite.data.raw import RawBatch, Words
from caffelite.data.transformer import ItemError, Transformer
from caffelite.errors import DataError


class Batch:
    """Memory for one transformed batch: data (N,H,W,C) in the wanted type and labels (N)."""

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.data: npt.NDArray[Any] = np.zeros(shape, dtype)
        self.labels = np.zeros(shape[0], np.float32)

    def store(self, items: Sequence[Pixels], words: Words, warp_words: Words | None, transformer: Transformer) -> None:
        """Takes the images; see Transformer.apply for the words and the errors."""
        transformer.apply(items, words, self.data, warp_words)


def _words(order: Order, position: int, count: int, transformer: Transformer) -> tuple[Words, Words | None]:
    """The random words of these positions, as Transformer.apply takes them."""
    key = (order.seed, order.stream, position, count)
    return words_at(*key), warp_words_at(*key) if transformer.warp.draws else None


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
            batch.store(items, *_words(order, self.position, count, self.transformer), self.transformer)
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
        batch.place(numbers, *_words(order, self.position, count, self.transformer), self.transformer)
        self.position += count
