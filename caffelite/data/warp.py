"""Rotation, zoom and lighting of training images: what is drawn for each image, and how the host samples.

A pixel (h,w) of the result is taken at row (oy + ah h) + aw w and column (ox + bh h) + bw w of the stored image, between whose four pixels around it is
interpolated; beyond the image its nearest edge goes on. `Warp.rows` gives these six numbers and what lighting adds to each channel; Backend.transform
has the formula to the last rounding, which `sample` follows.

Lighting is the noise of Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural Networks" (2012), section 4.1: each
principal component of the colours of ImageNet, times its eigenvalue and a factor from a normal distribution, is added to every pixel of an image. The
paper prints no components; these are the ones that are in common use, of colours from 0 to 1, here times 255.
"""

from __future__ import annotations

from collections.abc import Callable
from math import cos, log, pi, sin
from typing import Any

import numpy as np
import numpy.typing as npt

from caffelite.errors import SpecError
from caffelite.schema import pb

MOST_ROTATION = 180  # degrees
ZOOMS = (0.01, 100)
MOST_LIGHTING = 100
PLACED = 6  # numbers that say where a pixel is taken

_EIGENVALUES = np.array([0.2175, 0.0188, 0.0045]) * 255
_EIGENVECTORS = np.array([[-0.5836, -0.6948, 0.4203], [-0.5808, -0.0045, -0.8140], [-0.5675, 0.7192, 0.4009]])  # of blue, green and red
_COMPONENTS = _EIGENVECTORS * _EIGENVALUES

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


class Warp:
    """What a transform_param asks for; nothing but in training. `fail` makes the SpecErrors for values without a meaning, in any phase."""

    def __init__(self, param: pb.TransformationParameter, training: bool, fail: Callable[..., SpecError]) -> None:
        self.rotation, self.lighting, self.zoom = param.rotation, param.lighting, (param.min_zoom, param.max_zoom)
        self._gray: bool = param.force_gray
        self._fail = fail
        self._check(param)
        self.moves = training and (self.rotation > 0 or self.zoom != (1, 1))
        self.lights = training and self.lighting > 0
        self.draws = self.moves or self.lights

    def _check(self, param: pb.TransformationParameter) -> None:
        if not 0 <= self.rotation <= MOST_ROTATION:
            hint = "images are turned by up to so many degrees to either side"
            raise self._fail(f"rotation is {self.rotation:g}, expected 0 to {MOST_ROTATION} degrees", "transform_param", "rotation", hint=hint)
        least, most = ZOOMS
        for name, value in zip(("min_zoom", "max_zoom"), self.zoom):
            if not np.float32(least) <= value <= most:  # fields are float32
                hint = "1 leaves images as large as they are, 2 doubles height and width"
                raise self._fail(f"{name} is {value:g}, expected {least:g} to {most:g}", "transform_param", name, hint=hint)
        if self.zoom[0] > self.zoom[1]:
            given = "min_zoom" if param.HasField("min_zoom") else "max_zoom"
            message = f"min_zoom is {self.zoom[0]:g} and max_zoom {self.zoom[1]:g}: no factor lies between"
            raise self._fail(message, "transform_param", given, hint="each is 1 where it is not given")
        if not 0 <= self.lighting <= MOST_LIGHTING:
            message = f"lighting is {self.lighting:g}, expected 0 to {MOST_LIGHTING}"
            raise self._fail(message, "transform_param", "lighting", hint="0.1 is usual; it is a standard deviation")

    def check_channels(self, channels: int) -> None:
        """SpecError for lighting of images that are not in colour."""
        if self.lighting and channels != 3:
            hint = "remove lighting, or " + ("force_gray" if self._gray else "set force_color: true for encoded images")
            message = f"lighting changes colours: it needs images of 3 channels, these have {channels}"
            raise self._fail(message, "transform_param", "lighting", hint=hint)

    def width(self, channels: int) -> int:
        """How many numbers `rows` gives for an image; 0 when images are only cropped and mirrored."""
        return PLACED + channels if self.draws else 0

    def rows(self, words: npt.NDArray[np.uint64], places: npt.NDArray[np.int32], image: tuple[int, int, int]) -> Floats:
        """(N,6+C): oy, ah, aw, ox, bh, bw and what is added to each channel. words: (N,4); places: (N,3), as Transformer.places; image: (C,H,W) of
        the crop. All are computed in float64 and rounded once; an image's numbers do not depend on the others in its batch."""
        u = np.stack([words >> 32, words & 0xFFFFFFFF], -1).reshape(len(words), -1) / 2**32  # from 0 on, below 1
        angles, zooms = np.zeros(len(u)), np.ones(len(u))
        if self.moves:
            angles, zooms = (2 * u[:, 0] - 1) * self.rotation, self.zoom[0] + u[:, 1] * (self.zoom[1] - self.zoom[0])
        rows: Floats = np.zeros((len(u), PLACED + image[0]), np.float32)
        rows[:, :PLACED] = placing(angles, zooms, places, image[1:])
        if self.lights:
            rows[:, PLACED:] = shifts(self.lighting * _normal(*u[:, 2:6].T))
        return rows


def placing(angles: Doubles, zooms: Doubles, places: npt.NDArray[np.int32], size: tuple[int, int]) -> Doubles:
    """(N,6): oy, ah, aw, ox, bh, bw for crops of `size` (height, width) at places (N,3) (top, left, mirrored): the image, turned anticlockwise by an
    angle in degrees and magnified by a zoom about the crop's centre, is cropped and then mirrored."""
    top, left, mirrored = places.T
    middle, centre = (size[0] - 1) / 2, (size[1] - 1) / 2
    turns = angles * (pi / 180)
    # Rounded, so that quarter turns, whose cosine is 6e-17 in floating point, take pixels as they are.
    along, across = (np.round(_each(function, turns), 15) / zooms for function in (cos, sin))
    side = 1 - 2.0 * mirrored
    ah, aw, bh, bw = along, side * across, -across, side * along
    return np.stack([top + middle - ah * middle - aw * centre, ah, aw, left + centre - bh * middle - bw * centre, bh, bw], 1)


def shifts(factors: Doubles) -> Doubles:
    """(N,3): what the components, each times its factor (N,3), add to blue, green and red pixels from 0 to 255."""
    first, second, third = (factors[:, i : i + 1] * _COMPONENTS[:, i] for i in range(3))
    total: Doubles = first + second + third
    return total


def _normal(u: Doubles, v: Doubles, s: Doubles, t: Doubles) -> Doubles:
    """(N,3) numbers from the standard normal distribution (Box and Muller), from four (N) that are uniform from 0 on and below 1."""
    first, second = np.sqrt(-2 * _each(log, 1 - u)), np.sqrt(-2 * _each(log, 1 - s))
    return np.stack([first * _each(cos, 2 * pi * v), first * _each(sin, 2 * pi * v), second * _each(cos, 2 * pi * t)], 1)


def _each(function: Callable[[float], float], values: Doubles) -> Doubles:
    """The C library's function of each value, which, unlike NumPy's, cannot depend on where in a batch the value stands."""
    return np.array([function(value) for value in values.tolist()])


class Sampler:
    """Samples images into crops of height x width pixels; it keeps memory from one to the next."""

    def __init__(self, channels: int, height: int, width: int) -> None:
        self._rows, self._columns = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)
        self._taps = np.empty((4, channels, height * width), np.float32)
        self._flat = np.empty(0, np.float32)

    def sample(self, item: npt.NDArray[Any], mean: Any, row: Floats, out: Floats) -> None:
        """out (H,W,C) <- item (C,H',W') less mean (C,1,1), (C,H',W') or None, at the places that the first six numbers of `row` say."""
        channels, height, width = item.shape
        flat = self._room(item.size + width + 1)
        image = flat[: item.size].reshape(item.shape)
        if mean is None:
            image[...] = item
        else:
            np.subtract(item, mean, out=image)
        oy, ah, aw, ox, bh, bw = row[:PLACED]
        top, down = self._split((oy + ah * self._rows) + aw * self._columns, height)
        left, right = self._split((ox + bh * self._rows) + bw * self._columns, width)
        pixels = (top.astype(np.int64) * width + left.astype(np.int64)).ravel()
        first = np.arange(channels)[:, None] * (height * width) + pixels
        # In the last row and column the fraction is 0, and what stands behind them does not matter as long as it is finite.
        for taps, start in zip(self._taps, (0, 1, width, width + 1)):
            np.take(flat[start:], first, out=taps, mode="clip")
        upper, upper_right, lower, lower_right = self._taps
        _between(upper, upper_right, right)
        _between(lower, lower_right, right)
        _between(upper, lower, down)
        out[...] = upper.reshape(channels, *out.shape[:2]).transpose(1, 2, 0)

    @staticmethod
    def _split(at: Floats, size: int) -> tuple[Floats, Floats]:
        """Coordinates, kept within 0..size-1, as whole numbers and fractions (flat)."""
        np.clip(at, np.float32(0), np.float32(size - 1), out=at)
        whole = np.floor(at)
        at -= whole
        return whole, at.ravel()

    def _room(self, size: int) -> Floats:
        """Memory for `size` numbers, which are finite."""
        if self._flat.size < size:
            self._flat = np.zeros(size, np.float32)
        return self._flat


def _between(a: Floats, b: Floats, fraction: Floats) -> None:
    """a <- a + fraction (b - a); b is used up."""
    np.subtract(b, a, out=b)
    np.multiply(b, fraction, out=b)
    np.add(a, b, out=a)
