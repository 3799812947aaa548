"""Crop, mirror, mean and scale of images as records hold them."""

from __future__ import annotations

import numpy as np

from caffelite.backends.contract import Array
from caffelite.backends.numpy.common import Base, store


class Transform(Base):
    def transform(self, planes: Array, places: Array, mean: Array | None, y: Array, *, scale: float) -> None:
        channels, height, width = y.shape[1:]
        images = planes.reshape(-1, channels, *planes.shape[1:])
        for (record, top, left, mirrored), out in zip(places.tolist(), y):
            rows, columns = slice(top, top + height), slice(left, left + width)
            values = images[record, :, rows, columns].astype(np.float32)
            if mean is not None:
                values -= mean if mean.shape[1:] == (1, 1) else mean[:, rows, columns]
            values *= np.float32(scale)
            store(out, values[:, :, ::-1] if mirrored else values)
