"""Images that a device transforms: batches of stored bytes with the places of their crops, and their way to the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from caffelite.backends.contract import Array, Backend
from caffelite.data.images import Pixels
from caffelite.data.prefetch import Prefetcher
from caffelite.data.transformer import Transformer

ON_THE_WAY = 2  # batches that are neither being filled nor ready: one in use, one being copied
_ALIGN = 64  # bytes

Words = npt.NDArray[np.uint64]


class RawLayout(NamedTuple):
    """Where things lie in a block: planes (held*C,H,W) uint8, places (batch,4) int32 and warps (batch,warp) float32 as Backend.transform takes them,
    labels (batch) float32.

    image: (C,H,W) as stored. held: the images in the block: all of the batch, or none when the device has them already. warp: 0 where there are none."""

    batch: int
    held: int
    image: tuple[int, int, int]
    warp: int

    @property
    def places_at(self) -> int:
        """The byte at which the places begin."""
        return -(-self.held * prod(self.image) // _ALIGN) * _ALIGN

    @property
    def warps_at(self) -> int:
        """The byte at which the warps begin."""
        return self.places_at + 16 * self.batch

    @property
    def labels_at(self) -> int:
        """The byte at which the labels begin."""
        return self.warps_at + 4 * self.warp * self.batch

    @property
    def nbytes(self) -> int:
        """Of the block."""
        return self.labels_at + 4 * self.batch


class RawBatch:
    """One batch in a block of the host's memory. Where its images are not all bytes of one size it is not `raw`: `floats` (N,H,W,C) float32
    then holds them transformed."""

    def __init__(self, layout: RawLayout, block: Array) -> None:
        self.layout, self.block = layout, block
        self.images: npt.NDArray[np.uint8] = block[: layout.held * prod(layout.image)].reshape(layout.held, *layout.image)
        self.places: npt.NDArray[np.int32] = block[layout.places_at : layout.warps_at].view(np.int32).reshape(-1, 4)
        self.warps: npt.NDArray[np.float32] = block[layout.warps_at : layout.labels_at].view(np.float32).reshape(layout.batch, layout.warp)
        self.labels: npt.NDArray[np.float32] = block[layout.labels_at : layout.nbytes].view(np.float32)
        self.floats: npt.NDArray[np.float32] = np.empty(0, np.float32)
        self.raw = True

    def place(self, records: Any, words: Words, warp_words: Words | None, transformer: Transformer) -> None:
        """Says that the batch is these records of the planes, each cropped, mirrored and warped as its random words say."""
        self.places[:, 0] = records
        self.places[:, 1:] = transformer.places(words, *transformer.room(self.layout.image))
        warps = transformer.warps(warp_words, self.places[:, 1:], transformer.cropped(self.layout.image))
        if warps is not None:
            self.warps[...] = warps
        self.raw = True

    def store(self, items: Sequence[Pixels], words: Words, warp_words: Words | None, transformer: Transformer) -> None:
        """Takes the images; see Transformer.apply for the words and the errors."""
        if all(item.dtype == np.uint8 and item.shape == self.layout.image for item in items):
            for image, item in zip(self.images, items):
                image[...] = item
            self.place(np.arange(self.layout.batch), words, warp_words, transformer)
            return
        channels, height, width = transformer.cropped(self.layout.image)
        self.raw = False
        self.floats = self.floats if self.floats.size else np.empty((self.layout.batch, height, width, channels), np.float32)
        transformer.apply(items, words, self.floats, warp_words)


class RawFeed:
    """Carries batches from a prefetcher to a backend's arrays. While ops use one batch, the next is on its way.

    cached: the planes (R*C,H,W) of all records in the backend's memory, where the batches hold no images. Close it.
    """

    def __init__(self, ops: Backend, layout: RawLayout, transformer: Transformer, ready: int, cached: Array | None) -> None:
        self._ops, self._layout, self._scale, self._cached = ops, layout, float(transformer.scale), cached
        self._uploads = ops.uploads(layout.nbytes)
        self.slots = [RawBatch(layout, self._uploads.block()) for _ in range(ready + ON_THE_WAY)]
        self._coming: deque[tuple[RawBatch, Callable[[], None]]] = deque()
        self._used: deque[tuple[RawBatch, Callable[[], None]]] = deque()
        self._mean = self._on_device(transformer.mean)

    def _on_device(self, mean: npt.NDArray[np.float32] | None) -> Array | None:
        if mean is None:
            return None
        there = self._ops.empty(mean.shape, "float32")
        self._ops.from_host(mean, there)
        return there

    def load(self, prefetcher: Prefetcher[RawBatch], images: Array, labels: Array | None) -> None:
        """Transforms the prefetcher's next batch into images (N,C,H,W) and copies its labels (N). Raises what filling it raised."""
        while self._used:
            batch, settle = self._used.popleft()
            settle()
            prefetcher.put_back(batch)
        if not self._coming:
            self._send(prefetcher.get())
        self._used.append(self._coming.popleft())
        self._use(self._used[0][0], images, labels)
        following = prefetcher.ready()
        if following is not None:
            self._send(following)

    def _send(self, batch: RawBatch) -> None:
        self._coming.append((batch, self._uploads.send(batch.block) if batch.raw else _nothing))

    def _use(self, batch: RawBatch, images: Array, labels: Array | None) -> None:
        ops, layout = self._ops, self._layout
        if not batch.raw:
            ops.from_host(batch.floats.transpose(0, 3, 1, 2), images)
            if labels is not None:
                ops.from_host(batch.labels, labels)
            return
        block = self._uploads.receive()
        channels, height, width = layout.image
        planes = ops.view(block, 0, (layout.held * channels, height, width), "uint8") if self._cached is None else self._cached
        places = ops.view(block, layout.places_at, (layout.batch, 4), "int32")
        warps = ops.view(block, layout.warps_at, (layout.batch, layout.warp), "float32") if layout.warp else None
        ops.transform(planes, places, self._mean, images, warps, scale=self._scale)
        if labels is not None:
            ops.copy(ops.view(block, layout.labels_at, (layout.batch,), "float32"), labels)

    def reset(self) -> None:
        """Forgets the batches on their way, whose prefetcher has ended."""
        for _, settle in (*self._used, *self._coming):
            settle()
        for batch, _ in self._coming:
            if batch.raw:
                self._uploads.receive()
        self._used.clear()
        self._coming.clear()

    def close(self) -> None:
        """Lets go of all memory, once no copy is under way."""
        self._uploads.close()
        self._used.clear()
        self._coming.clear()
        self.slots.clear()


def _nothing() -> None:
    """A batch that was not sent is not waited for."""
