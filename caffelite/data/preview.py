"""Pictures of what a Data layer makes of its images: a row for each image, as it is stored and then as it is drawn, epoch after epoch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from caffelite.data.source import BatchSource
from caffelite.errors import DataError, SpecError
from caffelite.schema import pb

GAP = 2  # pixels between pictures
_GROUND = 255
_SHOWN = (1, 3)  # channels that a picture can have

Bytes = npt.NDArray[np.uint8]


def preview(
    data: pb.DataParameter, transform: pb.TransformationParameter, fail: Callable[..., SpecError], seed: int, stream: int, images: int, draws: int
) -> Bytes:
    """(C,H,W) pixels, blue first: the first `images` records, each cropped as in TEST and then `draws` times as a run with this seed has it in its
    epochs one after another, where it does not shuffle.

    Mean and scale are left out, so that pixels are seen as they are stored. Errors as BatchSource's, and DataError for images that are no pictures."""
    data, transform = _copied(data), _copied(transform)
    data.shuffle, data.cache, data.prefetch = False, pb.DataParameter.NONE, 1
    for field in ("mean_file", "mean_value", "scale"):
        transform.ClearField(field)
    plain = _copied(transform)
    plain.mirror = False
    drawn = BatchSource(data, transform, pb.TRAIN, seed, stream, fail)
    still = BatchSource(data, plain, pb.TEST, seed, stream, fail)
    try:
        images = min(images, drawn.count)
        columns = [_batch(still, images)]
        if still.raw_shape is None or still.item_shape[0] not in _SHOWN:
            what = f"{still.item_shape[0]} channels" if still.raw_shape else "floats"
            raise DataError(f"the images of {data.source} have {what}, expected bytes in 1 or 3 channels: they are no pictures")
        for epoch in range(draws):
            drawn.seek(epoch * drawn.count)
            columns.append(_batch(drawn, images))
    finally:
        still.close()
        drawn.close()
    return _grid(np.stack(columns, 1))


def _copied(message: Any) -> Any:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


def _batch(source: BatchSource, images: int) -> Bytes:
    """The next batch, (N,C,H,W), rounded to bytes."""
    out = np.empty((images, *source.item_shape), np.float32)
    source.start(images)
    source.next(out)
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)


def _grid(pictures: Bytes) -> Bytes:
    """(rows,columns,C,H,W) side by side, with gaps around them."""
    rows, columns, channels, height, width = pictures.shape
    grid = np.full((channels, rows * (height + GAP) + GAP, columns * (width + GAP) + GAP), _GROUND, np.uint8)
    for (row, column), picture in ((at, pictures[at]) for at in np.ndindex(rows, columns)):
        top, left = GAP + row * (height + GAP), GAP + column * (width + GAP)
        grid[:, top : top + height, left : left + width] = picture
    return grid
