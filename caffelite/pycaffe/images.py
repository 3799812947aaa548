"""resize_image and oversample of caffe.io: (H,W,C) images as NumPy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from caffelite.errors import SpecError

Image = npt.NDArray[Any]
NEAREST, BILINEAR = 0, 1


def resize_image(im: npt.ArrayLike, new_dims: Sequence[int], interp_order: int = BILINEAR) -> npt.NDArray[np.float32]:
    """The (H,W,C) image as float32 (new_dims[0], new_dims[1], C), interpolated between the nearest four pixels (interp_order 1) or taken from
    the nearest one (0). Nothing is averaged when it shrinks.

    As pycaffe does by scikit-image and SciPy: with 1 or 3 channels pixel i of n stands for (i + 0.5) N/n - 0.5, and beyond the image lies its
    lowest value, which the outermost pixels of an enlarged one take in; with others the corners meet, i (N - 1)/(n - 1), so that nothing lies
    beyond. SpecError for what is no such image or size, and for splines (orders above 1).
    """
    image = checked_image(im)
    height, width = (int(size) for size in new_dims)
    if min(height, width) < 1 or not image.size:
        raise SpecError(f"an image of shape {image.shape} cannot be resized to {height}x{width}")
    if interp_order not in (NEAREST, BILINEAR):
        raise SpecError(f"interp_order is {interp_order!r}, expected 1 (bilinear) or 0 (the nearest pixel)")
    centred = image.shape[2] in (1, 3)
    lowest = image.min()
    if centred and lowest == image.max():
        return np.full((height, width, image.shape[2]), lowest, np.float32)
    below = np.float64(lowest) if centred else np.float64(0)
    values = image.astype(np.float64) - below  # so that 0 stands for what lies beyond
    for axis, size in enumerate((height, width)):
        values = _resample(values, axis, _places(values.shape[axis], size, centred), interp_order)
    return (values + below).astype(np.float32)


def checked_image(im: npt.ArrayLike) -> Image:
    """`im` as an array. SpecError unless it has three axes."""
    image = np.asarray(im)
    if image.ndim != 3:
        hint = "a grey image has one channel: image[:, :, None]" if image.ndim == 2 else None
        raise SpecError(f"an image of shape {image.shape} is given, expected height, width, channels", hint=hint)
    return image


def _places(old: int, new: int, centred: bool) -> npt.NDArray[np.float64]:
    """Where each of the `new` pixels of an axis lies among its `old` ones."""
    steps = np.arange(new, dtype=np.float64)
    return (steps + 0.5) * (old / new) - 0.5 if centred else steps * ((old - 1) / max(new - 1, 1))


def _resample(values: Image, axis: int, places: npt.NDArray[np.float64], order: int) -> Image:
    if order == NEAREST:
        return values.take(np.floor(places + 0.5).astype(int), axis)
    first = np.floor(places).astype(int)
    share = places - first
    return _weighted(values, axis, first, 1 - share) + _weighted(values, axis, first + 1, share)


def _weighted(values: Image, axis: int, index: npt.NDArray[np.int_], weights: npt.NDArray[np.float64]) -> Image:
    """Rows (axis 0) or columns (axis 1) times their weights; 0 for those beyond the image."""
    inside = (index >= 0) & (index < values.shape[axis])
    column = np.where(inside, weights, 0.0)
    return values.take(np.where(inside, index, 0), axis) * column.reshape([-1 if i == axis else 1 for i in range(3)])


def oversample(images: Sequence[npt.ArrayLike], crop_dims: Sequence[int]) -> npt.NDArray[np.float32]:
    """Ten crops of each (H,W,C) image, float32 (10 N, crop_dims[0], crop_dims[1], C): top left, top right, bottom left, bottom right, centre,
    and the same five mirrored. SpecError when there is no image, when they differ in size, or when a crop does not fit in them."""
    arrays = [checked_image(image) for image in images]
    if not arrays:
        raise SpecError("no image is given")
    shape, (high, wide) = arrays[0].shape, (int(size) for size in crop_dims)
    for array in arrays:
        if array.shape != shape:
            raise SpecError(f"images of shapes {shape} and {array.shape} are given, expected one size", hint="resize them first: caffe.io.resize_image")
    top, left = centre_offset(shape[0], high), centre_offset(shape[1], wide)
    bottom, right = shape[0] - high, shape[1] - wide
    crops = np.empty((len(arrays), 2, 5, high, wide, shape[2]), np.float32)
    for place, (y, x) in enumerate(((0, 0), (0, right), (bottom, 0), (bottom, right), (top, left))):
        for crop, array in zip(crops, arrays):
            crop[0, place] = array[y : y + high, x : x + wide]
    crops[:, 1] = crops[:, 0, :, :, ::-1]
    return crops.reshape(-1, high, wide, shape[2])


def centre_offset(size: int, crop: int) -> int:
    """Where the crop in the middle begins: (size - crop) / 2, rounded down. SpecError when it does not fit."""
    if not 0 < crop <= size:
        raise SpecError(f"a crop of {crop} pixels does not fit into {size}")
    return (size - crop) // 2
