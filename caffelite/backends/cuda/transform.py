"""Crop, mirror, mean and scale of images as records hold them, and rotation, zoom and lighting; kernels/transform.cu."""

from __future__ import annotations

import numpy as np

from caffelite.backends.contract import Array
from caffelite.backends.cuda.common import THREADS, Base, blocks, cname
from caffelite.backends.cuda.elementwise import vectors
from caffelite.backends.cuda.launch import Module, typed

TRANSFORM = Module("transform", typed("transform", "transform_warped"))
IMAGES = np.dtype([(name, np.int32) for name in ("channels", "height", "width", "rows", "columns", "mean_image")])  # struct Images


class Transform(Base):
    def transform(self, planes: Array, places: Array, mean: Array | None, y: Array, warps: Array | None = None, *, scale: float) -> None:
        whole = mean is not None and mean.shape[1:] != (1, 1)
        shape = np.array((y.shape[1], *planes.shape[1:], *y.shape[2:], whole), IMAGES)[()]
        kernel, ways = ("transform", (places,)) if warps is None else ("transform_warped", (places, warps))
        self.launch(TRANSFORM, f"{kernel}<{cname(y)}>", blocks(vectors(y)), THREADS, planes, *ways, mean, y, shape, np.float32(scale), np.int64(y.size))
