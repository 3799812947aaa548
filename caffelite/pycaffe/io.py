"""caffe.io: images from files, Transformer, and NumPy arrays in and out of Caffe's messages."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from caffelite.data.images import decode_image
from caffelite.errors import DataError, Where
from caffelite.pycaffe.images import oversample, resize_image
from caffelite.pycaffe.transformer import Transformer
from caffelite.schema import array_to_blob, blob_to_array, message_bytes, parse_blobs, pb
from caffelite.schema.binary import open_failure

__all__ = [
    "Transformer",
    "array_to_blobproto",
    "array_to_datum",
    "arraylist_to_blobprotovector_str",
    "blobproto_to_array",
    "blobprotovector_str_to_arraylist",
    "datum_to_array",
    "load_image",
    "oversample",
    "resize_image",
]

_LUMA = np.array([0.2125, 0.7154, 0.0721])  # of red, green and blue: ITU-R BT.709's, as scikit-image's rgb2gray has them


def load_image(filename: str | os.PathLike[str], color: bool = True) -> npt.NDArray[np.float32]:
    """The picture in a file as float32 from 0 to 1: (H,W,3), red first, a grey one three times; or, without `color`, its luma (H,W,1).

    Transparency is dropped; a photo's EXIF rotation is not applied. DataError when the file is missing or no picture of 8 bits a channel.
    """
    name = os.fspath(filename)
    try:
        with open(name, "rb") as file:
            planes = decode_image(file.read())
    except OSError as error:
        raise open_failure(name, error, "an image", DataError) from error
    except DataError as error:
        raise DataError(error.message, where=Where(name), hint=error.hint) from error
    image = planes[2::-1].transpose(1, 2, 0) / np.float32(255)  # blue, green, red, alpha before
    if color:
        return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))
    return np.ascontiguousarray(image) if image.shape[2] == 1 else (image @ _LUMA).astype(np.float32)[:, :, None]


def blobproto_to_array(blob: pb.BlobProto, return_diff: bool = False) -> npt.NDArray[np.float32]:
    """The values of a BlobProto, or its gradient, as float32 in its shape; four axes where it has the old num, channels, height, width.
    SnapshotError when their number does not fit."""
    return blob_to_array(blob, diff=return_diff)


def array_to_blobproto(arr: npt.ArrayLike, diff: npt.ArrayLike | None = None) -> pb.BlobProto:
    """A BlobProto with the array's shape and values. SnapshotError when `diff` has another shape."""
    blob = pb.BlobProto()
    array_to_blob(arr, blob, diff)
    return blob


def arraylist_to_blobprotovector_str(arraylist: Iterable[npt.ArrayLike]) -> bytes:
    """The bytes of a BlobProtoVector that holds the arrays."""
    return message_bytes(pb.BlobProtoVector(blobs=[array_to_blobproto(array) for array in arraylist]))


def blobprotovector_str_to_arraylist(data: bytes) -> list[npt.NDArray[np.float32]]:
    """The arrays in the bytes of a BlobProtoVector. SnapshotError when they are no such message."""
    return [blobproto_to_array(blob) for blob in parse_blobs(data)]


def array_to_datum(arr: npt.ArrayLike, label: int | None = None) -> pb.Datum:
    """A database record of a (C,H,W) array: its bytes when it is uint8, otherwise its values as floats. DataError for another number of axes."""
    array = np.asarray(arr)
    if array.ndim != 3:
        raise DataError(f"an array of shape {array.shape} is given, expected channels, height, width")
    datum = pb.Datum(channels=array.shape[0], height=array.shape[1], width=array.shape[2])
    if array.dtype == np.uint8:
        datum.data = array.tobytes()
    else:
        datum.float_data.extend(array.astype(float).ravel().tolist())
    if label is not None:
        datum.label = label
    return datum


def datum_to_array(datum: pb.Datum) -> npt.NDArray[Any]:
    """The (C,H,W) values of a record: uint8 pixels (blue first in Caffe's databases, decoded if it holds a picture file), or float64.
    DataError when it does not hold as many as it says."""
    if datum.encoded:
        return decode_image(datum.data)
    shape = (datum.channels, datum.height, datum.width)
    values: npt.NDArray[Any] = np.frombuffer(datum.data, np.uint8).copy() if datum.data else np.array(datum.float_data, float)
    if min(shape) < 0 or values.size != np.prod(shape):
        raise DataError(f"a record says {'x'.join(map(str, shape))} but holds {values.size} values")
    return values.reshape(shape)
