"""Crop, mirror, mean and scale of images as records hold them, and rotation, zoom and lighting."""

from __future__ import annotations

from typing import Any

import numpy as np

from caffelite.backends.contract import Array
from caffelite.backends.numpy.common import Base, store


class Transform(Base):
    def transform(self, planes: Array, places: Array, mean: Array | None, y: Array, warps: Array | None = None, *, scale: float) -> None:
        channels, height, width = y.shape[1:]
        images = planes.reshape(-1, channels, *planes.shape[1:])
        for n, ((record, top, left, mirrored), out) in enumerate(zip(places.tolist(), y)):
            if warps is not None:
                values = _warped(images[record], mean, warps[n], height, width)
            else:
                rows, columns = slice(top, top + height), slice(left, left + width)
                values = images[record, :, rows, columns].astype(np.float32)
                if mean is not None:
                    values -= mean if mean.shape[1:] == (1, 1) else mean[:, rows, columns]
                values = values[:, :, ::-1] if mirrored else values
            store(out, values * np.float32(scale))


def _warped(image: Array, mean: Array | None, warp: Array, height: int, width: int) -> Any:
    """(C,height,width) of an image (C,H',W'), before the scale."""
    centred = image.astype(np.float32)
    if mean is not None:
        centred -= mean
    oy, ah, aw, ox, bh, bw = warp[:6]
    h, w = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)
    last_row, last_column = (size - 1 for size in image.shape[1:])
    r = np.clip((oy + ah * h) + aw * w, np.float32(0), np.float32(last_row))
    q = np.clip((ox + bh * h) + bw * w, np.float32(0), np.float32(last_column))
    i, j = r.astype(np.int64), q.astype(np.int64)
    fy, fx = r - i.astype(np.float32), q - j.astype(np.float32)
    below, right = np.minimum(i + 1, last_row), np.minimum(j + 1, last_column)
    upper = _between(centred[:, i, j], centred[:, i, right], fx)
    lower = _between(centred[:, below, j], centred[:, below, right], fx)
    return _between(upper, lower, fy) + warp[6:, None, None]


def _between(a: Array, b: Array, f: Array) -> Any:
    return a + f * (b - a)
