"""The data transformer: crop, mirror, mean, scale, and rotation, zoom and lighting (warp.py), on whole batches.

out[c, h, w'] = (in[c, h + top, w + left] - mean) * scale in float32, w' mirrored or not. Pixels are first gathered as bytes, channels
last; one pass over the batch then converts, subtracts and scales, so that the cost per image is little more than copying it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from caffelite.data.images import Pixels, size_text
from caffelite.data.warp import PLACED, Sampler, Warp
from caffelite.errors import CaffeliteError, DataError, SpecError
from caffelite.schema import blob_to_array, pb, read_blob

Fail = Callable[..., SpecError]
Floats = npt.NDArray[np.float32]
_BITS = (1 << 31) - 1


class Transformer:
    """transform_param, checked. `fail(message, *path, hint=)` makes the SpecErrors, placed in the net's file."""

    def __init__(self, param: pb.TransformationParameter, training: bool, fail: Fail) -> None:
        self.param, self.training, self._fail = param, training, fail
        self.crop: int = param.crop_size
        self.mirror: bool = param.mirror
        self.scale = np.float32(param.scale)
        if param.force_color and param.force_gray:
            raise fail("force_color and force_gray exclude each other", "transform_param", "force_gray", hint="set at most one of them")
        if param.HasField("mean_file") and param.mean_value:
            raise fail("mean_file and mean_value exclude each other", "transform_param", "mean_value", hint="set at most one of them")
        self.warp = Warp(param, training, fail)
        self.channels = 3 if param.force_color else 1 if param.force_gray else None
        self._mean: Floats | None = None  # (H,W,C) or (C,)
        self._mirrored_mean: Floats | None = None
        self._held: dict[Any, npt.NDArray[Any]] = {}
        self._sampler: Sampler | None = None

    def output_shape(self, item: tuple[int, ...]) -> tuple[int, int, int]:
        """The (C,H,W) that items of shape `item` become; reads the mean. SpecError when crop, lighting or mean do not fit such items, DataError
        when the mean cannot be read."""
        shape = self.cropped(item)
        self._load_mean(*item)
        return shape

    def cropped(self, item: tuple[int, ...]) -> tuple[int, int, int]:
        """The same without a look at the mean. SpecError when crop or lighting do not fit."""
        channels, height, width = item
        self.warp.check_channels(channels)
        if self.crop > min(height, width):
            raise self._fail(
                f"crop_size is {self.crop}, but the images are {height}x{width}", "transform_param", "crop_size", hint=f"use at most {min(height, width)}"
            )
        return (channels, self.crop or height, self.crop or width)

    @property
    def mean(self) -> Floats | None:
        """What is subtracted: (C,H,W) of a mean_file, (C,1,1) of mean_values, or None. Known once output_shape has been called."""
        if self._mean is None:
            return None
        return self._mean.transpose(2, 0, 1) if self._mean.ndim == 3 else self._mean[:, None, None]

    def _load_mean(self, channels: int, height: int, width: int) -> None:
        values = self.param.mean_value
        if len(values) not in (0, 1, channels):
            raise self._fail(
                f"{len(values)} mean_value, but the images have {channels} channel(s)", "transform_param", "mean_value", hint=f"give one or {channels}"
            )
        if values:
            self._mean = np.broadcast_to(np.array(values, np.float32), (channels,))
        elif self.param.HasField("mean_file"):
            mean = self._read_mean()
            if mean.shape != (channels, height, width):
                raise self._fail(
                    f"the mean in {self.param.mean_file} is {size_text(mean.shape)}, but the images are {size_text((channels, height, width))}",
                    "transform_param",
                    "mean_file",
                    hint="make the mean from these images with `caffelite mean`, at their uncropped size",
                )
            self._mean = np.ascontiguousarray(mean.transpose(1, 2, 0))
            self._mirrored_mean = np.ascontiguousarray(self._mean[:, ::-1])

    def _read_mean(self) -> Floats:
        try:
            mean = blob_to_array(read_blob(self.param.mean_file))
        except CaffeliteError as error:
            hint, error.hint = error.hint, None
            place = self._fail(f"mean_file cannot be used: {error}", "transform_param", "mean_file")
            raise DataError(place.message, where=place.where, layer=place.layer, hint=hint) from error
        return mean[0] if mean.ndim == 4 and mean.shape[0] == 1 else mean

    # --- running -------------------------------------------------------------------------------------------------------

    def apply(self, items: Sequence[Pixels], words: npt.NDArray[np.uint64], out: npt.NDArray[Any], warp_words: npt.NDArray[np.uint64] | None = None) -> None:
        """Transforms `items`, uint8 or float32 (C,H,W) each, into out, C-contiguous (N,H,W,C), float32 or rounded from it.

        words[i] is item i's random number, see `places`, and warp_words[i] (see `warps`) more of them. DataError for an item whose size does not fit.
        """
        floats = out if out.dtype == np.float32 else self._staging(out.shape, np.float32)
        rooms = np.array([self._checked_room(item.shape, out.shape[1:], i) for i, item in enumerate(items)])
        places = self.places(words, rooms[:, 0], rooms[:, 1])
        warps = self.warps(warp_words, places, (out.shape[3], out.shape[1], out.shape[2]))
        if warps is not None and self.warp.moves:
            self._sample(items, warps, floats)
        else:
            self._crop(items, places.tolist(), floats)
        if warps is not None and self.warp.lights:
            rows = floats.reshape(*floats.shape[:2], -1)  # whole rows, so that the inner loop is long
            rows += np.tile(warps[:, None, PLACED:], floats.shape[2])
        if self.scale != 1:
            floats *= self.scale
        if floats is not out:
            out[...] = floats

    def _crop(self, items: Sequence[Pixels], places: Sequence[tuple[int, int, int]], floats: Floats) -> None:
        """floats (N,H,W,C) <- the items' crops at their places, less the mean."""
        as_bytes = all(item.dtype == np.uint8 for item in items)
        target = self._staging(floats.shape, np.uint8) if as_bytes else floats
        for item, (top, left, mirrored), image in zip(items, places, target.transpose(0, 3, 1, 2)):
            part = item[:, top : top + image.shape[1], left : left + image.shape[2]]
            image[...] = part[:, :, ::-1] if mirrored else part
        if as_bytes:
            floats[...] = target
        self._centre(floats, places)

    def _sample(self, items: Sequence[Pixels], warps: Floats, floats: Floats) -> None:
        """The same for items that are rotated or zoomed."""
        if self._sampler is None:
            self._sampler = Sampler(floats.shape[3], *floats.shape[1:3])
        mean = None if self.mean is None else np.ascontiguousarray(self.mean)  # planes, as the items
        for item, row, image in zip(items, warps, floats):
            self._sampler.sample(item, mean, row, image)

    def places(self, words: npt.NDArray[np.uint64], rows: Any, columns: Any) -> npt.NDArray[np.int32]:
        """(N,3): row and column of each item's crop, and 1 if it is mirrored, else 0. rows, columns: the items' room, see `room`.

        A word's top bit decides about mirroring, its two lower 31-bit fields (modulo the number of places) about row and column.
        """
        places = np.zeros((len(words), 3), np.int32)
        if self.training and self.crop:
            places[:, 0] = (words >> 31 & _BITS).astype(np.int64) % (rows + 1)
            places[:, 1] = (words & _BITS).astype(np.int64) % (columns + 1)
        else:
            places[:, 0], places[:, 1] = rows // 2, columns // 2
        if self.mirror:
            places[:, 2] = words >> 63
        return places

    def warps(self, warp_words: npt.NDArray[np.uint64] | None, places: npt.NDArray[np.int32], image: tuple[int, int, int]) -> Floats | None:
        """(N,6+C) as Backend.transform takes them, for crops (C,H,W) `image` at these places; None where images are only cropped and mirrored.

        warp_words: (N,4) random words; needed where there is something to be drawn."""
        if not self.warp.draws:
            return None
        assert warp_words is not None
        return self.warp.rows(warp_words, places, image)

    def room(self, item: tuple[int, int, int]) -> tuple[int, int]:
        """By how many rows and columns items (C,H,W) are larger than the crop."""
        _, height, width = self.cropped(item)
        return item[1] - height, item[2] - width

    def _staging(self, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
        """Memory for a batch on its way, kept for the next."""
        held = self._held.get(dtype)
        if held is None or held.shape != shape:
            held = self._held[dtype] = np.empty(shape, dtype)
        return held

    def _checked_room(self, item: tuple[int, ...], out: tuple[int, ...], index: int) -> tuple[int, int]:
        """The room of item number `index` of a batch. ItemError when the item does not fit."""
        height, width, channels = out
        if item[0] != channels:
            hint = "with encoded images, force_color or force_gray in transform_param makes all alike" if {item[0], channels} <= {1, 3, 4} else None
            raise ItemError(index, f"it has {item[0]} channel(s), the first record has {channels}", hint=hint)
        rows, columns = item[1] - height, item[2] - width
        if not self.crop and (rows or columns):
            raise ItemError(index, f"it is {item[1]}x{item[2]}, the first record is {height}x{width}", hint="set crop_size, or resize all when converting")
        if min(rows, columns) < 0:
            raise ItemError(index, f"it is {item[1]}x{item[2]}, smaller than crop_size {self.crop}", hint="resize all when converting")
        if self.param.HasField("mean_file") and self._mean is not None and item[1:] != self._mean.shape[:2]:
            raise ItemError(index, f"it is {item[1]}x{item[2]}, the mean image is {self._mean.shape[0]}x{self._mean.shape[1]}", hint="use mean_value instead")
        return rows, columns

    def _centre(self, out: Floats, places: Sequence[tuple[int, int, int]]) -> None:
        mean = self._mean
        if mean is not None and mean.ndim == 1 and mean.any():
            rows = out.reshape(len(out) * out.shape[1], -1)  # whole rows, so that the inner loop is long
            rows -= np.tile(mean, out.shape[2])
        elif mean is not None and mean.ndim == 3 and self._mirrored_mean is not None:
            height, width = out.shape[1:3]
            for image, (top, left, mirrored) in zip(out, places):
                start = mean.shape[1] - width - left if mirrored else left
                image -= (self._mirrored_mean if mirrored else mean)[top : top + height, start : start + width]


class ItemError(DataError):
    """A DataError about item `index` of a batch; the reader adds which record that was."""

    def __init__(self, index: int, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.index = index
