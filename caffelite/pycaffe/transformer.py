"""caffe.io.Transformer: images as people hold them, made into what a net's inputs take, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from caffelite.errors import SpecError, did_you_mean
from caffelite.pycaffe.images import checked_image, resize_image

Values = npt.NDArray[np.float32]


class Transformer:
    """Transformer({"data": net.blobs["data"].data.shape}): what preprocess does to the images of each input, in the order of its docstring.

    Steps that were not set are left out. Every method raises SpecError for an input that is not among those given here.
    """

    def __init__(self, inputs: Mapping[str, Sequence[int]]) -> None:
        self.inputs = {name: tuple(int(size) for size in shape) for name, shape in inputs.items()}
        self.transpose: dict[str, tuple[int, ...]] = {}
        self.channel_swap: dict[str, tuple[int, ...]] = {}
        self.raw_scale: dict[str, float] = {}
        self.mean: dict[str, Values] = {}
        self.input_scale: dict[str, float] = {}

    def preprocess(self, in_: str, data: npt.ArrayLike) -> Values:
        """An image (H,W,C) as float32 for the input `in_`: resized to the input's height and width, transposed, its channels swapped,
        then (x raw_scale - mean) input_scale. `data` stays as it is. SpecError when the image does not fit the settings."""
        shape = self._shape(in_)
        image = np.array(checked_image(data), np.float32)
        if image.shape[:2] != shape[2:]:
            image = resize_image(image, shape[2:])
        if in_ in self.transpose:
            image = image.transpose(self.transpose[in_])
        if in_ in self.channel_swap:
            if len(image) != len(self.channel_swap[in_]):
                raise SpecError(f"{len(image)} channels are given, channel_swap has {len(self.channel_swap[in_])}", blob=in_, hint=_CHANNELS_FIRST)
            image = image[list(self.channel_swap[in_])]
        if in_ in self.raw_scale:
            image = image * np.float32(self.raw_scale[in_])
        if in_ in self.mean:
            image = image - self._fitting_mean(in_, image.shape)
        if in_ in self.input_scale:
            image = image * np.float32(self.input_scale[in_])
        return image

    def deprocess(self, in_: str, data: npt.ArrayLike) -> Values:
        """Takes one item of the input `in_`, (C,H,W) or (1,C,H,W), back through all steps but the resizing. A copy, float32."""
        self._shape(in_)
        image = np.array(data, np.float32)
        while image.ndim > 3 and len(image) == 1:
            image = image[0]
        if image.ndim != 3:
            raise SpecError(f"values of shape {image.shape} are given, expected one item", blob=in_)
        if in_ in self.input_scale:
            image = image / np.float32(self.input_scale[in_])
        if in_ in self.mean:
            image = image + self._fitting_mean(in_, image.shape)
        if in_ in self.raw_scale:
            image = image / np.float32(self.raw_scale[in_])
        if in_ in self.channel_swap:
            image = image[np.argsort(self.channel_swap[in_])]
        return image.transpose(np.argsort(self.transpose[in_])) if in_ in self.transpose else image

    def set_transpose(self, in_: str, order: Sequence[int]) -> None:
        """The order of the image's axes in the input: (2, 0, 1) for height, width, channels."""
        self.transpose[in_] = _order(order, len(self._shape(in_)) - 1, "transpose", in_)

    def set_channel_swap(self, in_: str, order: Sequence[int]) -> None:
        """The order of the image's channels in the input: (2, 1, 0) turns red, green, blue into Caffe's blue, green, red."""
        self.channel_swap[in_] = _order(order, self._shape(in_)[1], "channel_swap", in_)

    def set_raw_scale(self, in_: str, scale: float) -> None:
        """A factor before the mean is taken off: 255 for images of 0 to 1 and a net made for 0 to 255."""
        self._shape(in_)
        self.raw_scale[in_] = float(scale)

    def set_mean(self, in_: str, mean: npt.ArrayLike) -> None:
        """What is taken off, in the input's order of channels: (C,) one value each; (H,W), or (C,H,W), which is resized if it has to be."""
        shape = self._shape(in_)
        values = np.asarray(mean, np.float32)
        if values.ndim == 1:
            if len(values) != shape[1]:
                raise SpecError(f"a mean of {len(values)} values is given, the input has {shape[1]} channels", blob=in_)
            self.mean[in_] = values[:, None, None]
            return
        if values.ndim == 2:
            values = values[None]
        if values.ndim != 3 or len(values) not in (1, shape[1]):
            raise SpecError(f"a mean of shape {np.shape(mean)} is given, expected (channels), (height, width) or {shape[1:]}", blob=in_)
        if values.shape[1:] != shape[2:]:
            values = resize_image(values.transpose(1, 2, 0), shape[2:]).transpose(2, 0, 1)
        self.mean[in_] = values

    def set_input_scale(self, in_: str, scale: float) -> None:
        """A factor after the mean was taken off."""
        self._shape(in_)
        self.input_scale[in_] = float(scale)

    def _shape(self, in_: str) -> tuple[int, ...]:
        if in_ not in self.inputs:
            raise SpecError(f"the transformer has no input '{in_}'", hint=did_you_mean(in_, self.inputs))
        if len(self.inputs[in_]) != 4:
            raise SpecError(f"an input of shape {self.inputs[in_]} takes no images", blob=in_, hint="expected number, channels, height, width")
        return self.inputs[in_]

    def _fitting_mean(self, in_: str, shape: tuple[int, ...]) -> Values:
        mean = self.mean[in_]
        if any(size not in (1, found) for size, found in zip(mean.shape, shape)):
            raise SpecError(f"values of shape {shape} do not fit the mean's {mean.shape}", blob=in_, hint=_CHANNELS_FIRST)
        return mean


_CHANNELS_FIRST = "set_transpose(..., (2, 0, 1)) brings channels to the front"


def _order(order: Sequence[int], count: int, what: str, in_: str) -> tuple[int, ...]:
    axes = tuple(int(axis) for axis in order)
    if sorted(axes) != list(range(count)):
        raise SpecError(f"{what} is {axes}, expected the numbers 0 to {count - 1} in some order", blob=in_)
    return axes
