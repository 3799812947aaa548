"""Decoding of compressed images with Pillow into Caffe's planes: C x H x W, blue first."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from caffelite.errors import DataError

Pixels = npt.NDArray[Any]

_DIRECT = {"L": 1, "RGB": 3, "RGBA": 4}
_CONVERTED = {"1": "L", "P": "RGB", "CMYK": "RGB", "YCbCr": "RGB", "LAB": "RGB", "HSV": "RGB", "LA": "RGBA", "PA": "RGBA", "RGBX": "RGB", "RGBa": "RGBA"}


def decode_image(data: bytes | memoryview, channels: int | None = None, size: tuple[int, int] | None = None) -> npt.NDArray[np.uint8]:
    """The image in a JPEG, PNG or other file's bytes as uint8 (C,H,W) planes, B,G,R.

    channels: 3 converts to colour, 1 to gray, None keeps what is stored (1, 3 or 4). size: (height, width) to resize to, bilinear.
    Pillow's bilinear filter averages over the covered area when it shrinks; OpenCV's (Caffe's tool) takes the four nearest pixels.
    A photo's EXIF rotation is not applied, as in Caffe's time; newer OpenCV applies it.
    DataError when it is no image, is cut short, or has more than 8 bits a channel.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        image: Any = Image.open(io.BytesIO(data))
        return planes(_resized(_in_mode(image, channels), size))
    except DataError:
        raise
    except UnidentifiedImageError as error:  # whose text tells a memory address
        raise DataError("not a readable image: " + ("of no format that Pillow knows" if len(data) else "it is empty")) from error
    except Exception as error:  # Pillow's plugins raise many kinds for damaged files
        raise DataError(f"not a readable image: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error


def planes(image: Any) -> npt.NDArray[np.uint8]:
    """(C,H,W) planes, B,G,R(,A), of a Pillow image; a view where the image's memory allows."""
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        return pixels[None]
    if pixels.shape[2] == 4:
        return pixels[:, :, [2, 1, 0, 3]].transpose(2, 0, 1)
    return pixels[:, :, ::-1].transpose(2, 0, 1)


def encode_image(pixels: npt.NDArray[np.uint8], kind: str) -> bytes:
    """(C,H,W) planes, B,G,R, as the bytes of a "png" or "jpg" file (JPEG quality 95, OpenCV's default)."""
    from PIL import Image

    file = io.BytesIO()
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels[::-1].transpose(1, 2, 0)))
    if kind == "png":
        image.save(file, "PNG")
    else:
        image.save(file, "JPEG", quality=95)
    return file.getvalue()


def _in_mode(image: Any, channels: int | None) -> Any:
    mode = image.mode
    if mode not in _DIRECT and mode not in _CONVERTED:
        raise DataError(f"its pixels are of kind '{mode}', expected 8 bits a channel", hint="store it as 8-bit gray or RGB")
    wanted = {1: "L", 3: "RGB", None: mode if mode in _DIRECT else _CONVERTED[mode]}[channels]
    if mode != wanted:
        if mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return image.convert(wanted)
    image.load()
    return image


def _resized(image: Any, size: tuple[int, int] | None) -> Any:
    if size is None or (image.height, image.width) == size:
        return image
    from PIL import Image

    return image.resize((size[1], size[0]), Image.Resampling.BILINEAR)


def size_text(shape: Sequence[int]) -> str:
    """A shape as people write it: 3x64x64."""
    return "x".join(map(str, shape))
