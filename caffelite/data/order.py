"""Which record comes at which position, and the random numbers of each position: pure functions of (seed, stream, position).

`position` counts the records handed out since the beginning, over all epochs; epoch = position // count. Random words are those
of NumPy's Philox 4x64-10 keyed with (seed, stream); the last counter word separates purposes, so no two draws share words.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

_AUGMENT, _SHUFFLE, _WARP = 1, 2, 3
_WORDS = 4  # 64-bit words of one Philox block
_MASK = 2**64 - 1


def words_at(seed: int, stream: int, position: int, count: int) -> npt.NDArray[np.uint64]:
    """One random 64-bit word for each of the positions position..position+count-1 (augmentation)."""
    block, skip = divmod(position, _WORDS)
    words: npt.NDArray[np.uint64] = _philox(seed, stream, [block, 0, 0, _AUGMENT]).random_raw(skip + count)
    return words[skip:]


def warp_words_at(seed: int, stream: int, position: int, count: int) -> npt.NDArray[np.uint64]:
    """(count,4): four more random words for each of the positions position..position+count-1 (rotation, zoom and lighting)."""
    words: npt.NDArray[np.uint64] = _philox(seed, stream, [position, 0, 0, _WARP]).random_raw(count * _WORDS)
    return words.reshape(count, _WORDS)


def permutation(seed: int, stream: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """The order of an epoch: the numbers 0..count-1 sorted by a random word each."""
    words = _philox(seed, stream, [0, 0, epoch, _SHUFFLE]).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.int64)


def _philox(seed: int, stream: int, counter: list[int]) -> Any:
    return np.random.Philox(key=np.array([seed & _MASK, stream & _MASK], np.uint64), counter=np.array(counter, np.uint64))


def class_by_class(labels: Sequence[int]) -> bool:
    """Whether there are several classes and all records of each follow each other."""
    return 1 < len(set(labels)) == sum(1 for _ in groupby(labels))


class Order:
    """Maps positions to record numbers: key order, or with `shuffle` a new permutation every epoch."""

    def __init__(self, count: int, shuffle: bool, seed: int, stream: int) -> None:
        self.count, self.shuffle, self.seed, self.stream = count, shuffle, seed, stream
        self._epoch, self._numbers = -1, np.empty(0, np.int64)

    def numbers(self, position: int, length: int) -> list[int]:
        """The record numbers of `length` positions from `position` on; a batch may span epochs."""
        result: list[int] = []
        while len(result) < length:
            epoch, offset = divmod(position + len(result), self.count)
            stop = min(self.count, offset + length - len(result))
            result += self._epoch_numbers(epoch)[offset:stop].tolist() if self.shuffle else range(offset, stop)
        return result

    def _epoch_numbers(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch != self._epoch:
            self._epoch, self._numbers = epoch, permutation(self.seed, self.stream, epoch, self.count)
        return self._numbers
