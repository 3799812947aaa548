"""caffe.Classifier: a net with the preparation of its images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from caffelite.errors import SpecError
from caffelite.pycaffe.images import centre_offset, checked_image, oversample, resize_image
from caffelite.pycaffe.net import Net
from caffelite.pycaffe.settings import TEST
from caffelite.pycaffe.transformer import Transformer


class Classifier(Net):
    """A Net in the TEST phase, with a Transformer of its first input that takes images of (H,W,C).

    image_dims: (height, width) that images are resized to before they are cut; the input's own unless given. mean, input_scale, raw_scale and
    channel_swap are the Transformer's. SpecError when they do not fit the input.
    """

    def __init__(
        self,
        model_file: str | Path,
        pretrained_file: str | Path,
        image_dims: Sequence[int] | None = None,
        mean: npt.ArrayLike | None = None,
        input_scale: float | None = None,
        raw_scale: float | None = None,
        channel_swap: Sequence[int] | None = None,
    ) -> None:
        super().__init__(model_file, phase=TEST, weights=pretrained_file)
        if not self.inputs:
            raise SpecError(f"{model_file} has no input for images", hint="give the net's deploy.prototxt")
        in_ = self.inputs[0]
        self.transformer = Transformer({in_: self.blobs[in_].shape})
        self.transformer.set_transpose(in_, (2, 0, 1))
        if mean is not None:
            self.transformer.set_mean(in_, mean)
        if input_scale is not None:
            self.transformer.set_input_scale(in_, input_scale)
        if raw_scale is not None:
            self.transformer.set_raw_scale(in_, raw_scale)
        if channel_swap is not None:
            self.transformer.set_channel_swap(in_, channel_swap)
        self.crop_dims = self.blobs[in_].shape[2:]
        self.image_dims = self.crop_dims if image_dims is None else tuple(int(size) for size in image_dims)
        if len(self.image_dims) != 2:
            raise SpecError(f"image_dims is {self.image_dims}, expected height and width")
        self._centre = [centre_offset(size, crop) for size, crop in zip(self.image_dims, self.crop_dims)]

    def predict(self, inputs: Sequence[npt.ArrayLike], oversample: bool = True) -> npt.NDArray[np.float32]:
        """The net's first output for each (H,W,C) image: the mean over its ten crops, or, without `oversample`, of its centre alone.

        With ten crops an output's axes after the first are joined into one. SpecError when no image is given.
        """
        if not len(inputs):
            raise SpecError("no image is given")
        channels = self.blobs[self.inputs[0]].shape[1]
        for shape in (checked_image(image).shape for image in inputs):
            if shape[2] != channels:
                raise SpecError(f"an image of shape {shape} is given, the input has {channels} channel(s)", blob=self.inputs[0])
        crops = self._crops([resize_image(image, self.image_dims) for image in inputs], oversample)
        prepared = np.stack([self.transformer.preprocess(self.inputs[0], crop) for crop in crops])
        given: dict[str, Any] = {self.inputs[0]: prepared}
        out = self.forward_all(**given)[self.outputs[0]]
        return out.reshape(len(inputs), 10, -1).mean(1) if oversample else out

    def _crops(self, images: list[npt.NDArray[np.float32]], ten: bool) -> list[npt.NDArray[np.float32]]:
        if ten:
            return list(oversample(images, self.crop_dims))
        (top, left), (high, wide) = self._centre, self.crop_dims
        return [image[top : top + high, left : left + wide] for image in images]
