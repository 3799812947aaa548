"""Small databases and images for the data tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from caffelite.data.lmdb_source import Writer
from caffelite.data.source import BatchSource
from caffelite.errors import SpecError
from caffelite.schema import pb

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def raw(pixels: Pixels, label: int = 0) -> bytes:
    """A raw Datum, made by protobuf itself."""
    channels, height, width = pixels.shape
    return pb.Datum(channels=channels, height=height, width=width, data=pixels.tobytes(), label=label, encoded=False).SerializeToString()


def write_lmdb(path: Path, values: Iterable[bytes]) -> Path:
    """An LMDB with these values in order, under keys 00000000, 00000001, ..."""
    path.mkdir(parents=True)
    writer = Writer(str(path))
    writer.put([(b"%08d" % i, value) for i, value in enumerate(values)])
    writer.finish()
    return path


def numbered(path: Path, count: int, shape: tuple[int, int, int] = (3, 8, 10)) -> tuple[Path, Pixels]:
    """An LMDB of `count` random images whose labels are their numbers, and the images."""
    images = np.random.default_rng(7).integers(0, 256, (count, *shape), np.uint8)
    return write_lmdb(path, [raw(image, i) for i, image in enumerate(images)]), images


def fail(message: str, *path: str | int, hint: str | None = None) -> SpecError:
    """Stands for Layer.fail: the place is told in the message."""
    return SpecError(f"{'.'.join(map(str, path))}: {message}", hint=hint)


def source_of(path: Path, batch: int = 4, *, phase: int = pb.TRAIN, seed: int = 3, transform: dict[str, Any] | None = None, **data: Any) -> BatchSource:
    """A BatchSource over an LMDB."""
    param = pb.DataParameter(**{"source": str(path), "batch_size": batch, "backend": pb.DataParameter.LMDB, **data})
    return BatchSource(param, pb.TransformationParameter(**(transform or {})), phase, seed, 11, fail)


def batches(source: BatchSource, count: int, dtype: str = "float32") -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The next `count` batches: data (count*N,C,H,W) and labels."""
    size = source.param.batch_size
    source.start(size, dtype)
    data = np.full((count, size, *source.item_shape), np.nan, np.float32)
    labels = np.full((count, size), np.nan, np.float32)
    for i in range(count):
        source.next(data[i], labels[i])
    return data.reshape(-1, *source.item_shape), labels.ravel()


def photo(height: int = 20, width: int = 24, seed: int = 0, channels: int = 3) -> Pixels:
    """A smooth (H,W,3) or (H,W) picture that survives JPEG."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [128 + 90 * np.sin(y / rng.uniform(3, 9) + i) * np.cos(x / rng.uniform(3, 9)) for i in range(channels)]
    picture = np.stack(waves, -1).astype(np.uint8)
    return picture if channels > 1 else picture[:, :, 0]


def save_image(path: Path, pixels: Pixels, **options: Any) -> Path:
    """Writes (H,W,3) or (H,W) pixels in the format of the file's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path
