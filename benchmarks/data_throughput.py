"""Images a second that a Data layer's source prepares on one core: LMDB read, crop, mirror, mean, cast. Prints one table.

  taskset -c 0 python benchmarks/data_throughput.py [--images 10000] [--batch 100] [--repeat 5]

Makes an LMDB of random raw 3x64x64 records in a temporary folder (and one of JPEG records), then times passes over it; the median
of the repeats is shown. One core does everything: the thread that prepares and the one that takes batches. Rows into "bytes" are the
host's part of feeding a GPU: records read and gathered, crops drawn; a backend that ignores what it is given stands for the GPU.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from caffelite.backends.numpy import NumpyBackend
from caffelite.data.images import encode_image
from caffelite.data.lmdb_source import Writer
from caffelite.data.source import BatchSource
from caffelite.errors import SpecError
from caffelite.schema import array_to_blob, message_bytes, pb

CROP = 48


def write_database(path: Path, images: int, encoded: bool) -> None:
    """An LMDB of `images` noisy 3x64x64 records."""
    path.mkdir()
    rng = np.random.default_rng(0)
    smooth = np.linspace(0, 200, 64 * 64).reshape(64, 64)
    writer = Writer(str(path))
    for start in range(0, images, 1000):
        records = []
        for i in range(start, min(start + 1000, images)):
            pixels = (smooth + rng.integers(0, 56, (3, 64, 64))).astype(np.uint8)
            if encoded:
                datum = pb.Datum(data=encode_image(pixels, "jpg"), label=i % 200, encoded=True)
            else:
                datum = pb.Datum(channels=3, height=64, width=64, data=pixels.tobytes(), label=i % 200, encoded=False)
            records.append((b"%08d_x" % i, datum.SerializeToString()))
        writer.put(records)
    writer.finish()


class Nowhere(NumpyBackend):
    """Takes raw images, and is their Uploads too, and does nothing with them."""

    raw_images = True

    def uploads(self, nbytes: int) -> Any:
        self._nbytes = nbytes
        return self

    def block(self) -> Any:
        return np.zeros(self._nbytes, np.uint8)

    def send(self, block: Any) -> Callable[[], None]:
        self._block = block
        return lambda: None

    def receive(self) -> Any:
        return self._block

    def close(self) -> None:
        pass

    def transform(self, planes: Any, places: Any, mean: Any, y: Any, warps: Any = None, *, scale: float) -> None:
        pass

    def copy(self, x: Any, y: Any) -> None:
        pass


def fail(message: str, *path: str | int, hint: str | None = None) -> SpecError:
    """Errors have no place here."""
    return SpecError(message, hint=hint)


def rate(database: Path, transform: pb.TransformationParameter, args: argparse.Namespace, dtype: str, shuffle: bool, cache: bool = False) -> float:
    """Median images a second over args.repeat passes."""
    param = pb.DataParameter(source=str(database), batch_size=args.batch, backend=pb.DataParameter.LMDB, shuffle=shuffle)
    param.cache = pb.DataParameter.DEVICE if cache else pb.DataParameter.NONE
    source = BatchSource(param, transform, pb.TRAIN, 1, 2, fail)
    shape = (args.batch, *source.item_shape)
    data = np.zeros((shape[0], shape[2], shape[3], shape[1]), np.float32)
    if dtype == "bfloat16":
        import ml_dtypes

        data = data.astype(ml_dtypes.bfloat16)
    label = np.zeros(args.batch, np.float32)
    batches = source.count // args.batch
    rates = []
    nowhere = Nowhere()
    if dtype != "bytes":
        source.start(args.batch, dtype)
    for _ in range(args.repeat + 1):
        start = time.perf_counter()
        for _ in range(batches):
            if dtype == "bytes":
                source.load(nowhere, args.batch, "float32", data.transpose(0, 3, 1, 2), label)
            else:
                source.next(data.transpose(0, 3, 1, 2), label)
        rates.append(batches * args.batch / (time.perf_counter() - start))
    source.close()
    return statistics.median(rates[1:])


def main() -> None:
    """Times every row of the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag, value in (("--images", 10000), ("--batch", 100), ("--repeat", 5)):
        parser.add_argument(flag, type=int, default=value)
    args = parser.parse_args()
    values = {"mean_value": [104, 117, 123], "crop_size": CROP, "mirror": True}
    with tempfile.TemporaryDirectory() as folder:
        raw, jpeg, mean = Path(folder) / "raw", Path(folder) / "jpeg", Path(folder) / "mean.binaryproto"
        write_database(raw, args.images, encoded=False)
        write_database(jpeg, args.images // 4, encoded=True)
        blob = pb.BlobProto()
        array_to_blob(np.full((1, 3, 64, 64), 120), blob)
        mean.write_bytes(message_bytes(blob))
        by_file = {"mean_file": str(mean), "crop_size": CROP, "mirror": True}
        lit = {"lighting": 0.1}
        warped = {"rotation": 15, "min_zoom": 0.9, "max_zoom": 1.2, "lighting": 0.1}
        print(f"{'records':34} {'order':8} {'into':9} images/s")
        for name, database, transform, dtype, shuffle, *cache in (
            ("raw, crop, mirror, mean_value", raw, values, "float32", False),
            ("raw, crop, mirror, mean_value", raw, values, "float32", True),
            ("raw, crop, mirror, mean_value", raw, values, "bfloat16", True),
            ("raw, crop, mirror, mean_file", raw, by_file, "float32", True),
            ("the same, lighting", raw, by_file | lit, "float32", True),
            ("raw, warped, mean_value", raw, values | warped, "float32", True),
            ("raw, warped, mean_value", raw, values | warped, "bfloat16", True),
            ("raw, warped, mean_file", raw, by_file | warped, "float32", True),
            ("raw, whole, scale", raw, {"scale": 1 / 256}, "float32", False),
            ("raw, crop, mirror, mean_value", raw, values, "bytes", False),
            ("raw, crop, mirror, mean_value", raw, values, "bytes", True),
            ("raw, warped, mean_value", raw, values | warped, "bytes", True),
            ("raw, ..., cache: DEVICE", raw, values, "bytes", True, True),
            ("JPEG, crop, mirror, mean_value", jpeg, values, "float32", True),
            ("JPEG, crop, mirror, mean_value", jpeg, values, "bytes", True),
        ):
            result = rate(database, pb.TransformationParameter(**transform), args, dtype, shuffle, *cache)
            print(f"{name:34} {'shuffled' if shuffle else 'keys':8} {dtype:9} {result:8,.0f}", flush=True)


if __name__ == "__main__":
    main()
