"""Turns image files into records, in processes of their own.

Pillow holds Python's lock for about half of the time that a small image takes, so threads alone do not fill two cores. A worker is
a plain child process that reads jobs from its standard input and ends with it: it cannot outlive the program, however that ends.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np

from caffelite.data.images import decode_image, encode_image
from caffelite.errors import DataError
from caffelite.schema import pb

_CHUNK = 64
_FEW = 256  # fewer images are done before a process has started


class ImageFile(NamedTuple):
    """An image to convert: its file, the name that becomes part of the key, and its class."""

    path: str
    name: str
    label: int


@dataclass(frozen=True)
class Settings:
    """How files become records. size: (height, width) to resize to. encoding: "" stores raw planes, "png" or "jpg" image files,
    "auto" the file's own kind."""

    channels: int = 3
    size: tuple[int, int] | None = None
    encoding: str = ""


class Record(NamedTuple):
    """A serialised Datum, and the (height, width) of its image."""

    data: bytes
    size: tuple[int, int]


class Failure(NamedTuple):
    """A file that could not be used, and why."""

    path: str
    reason: str


def make_record(image: ImageFile, settings: Settings) -> Record | Failure:
    """The Datum of one file, as Caffe's convert_imageset makes it."""
    try:
        with open(image.path, "rb") as file:
            content = file.read()
        pixels = decode_image(content, settings.channels, settings.size)
    except OSError as error:
        return Failure(image.path, f"cannot be read: {error.strerror or error}")
    except (DataError, MemoryError) as error:
        return Failure(image.path, error.message if isinstance(error, DataError) else "too large for the memory")
    channels, height, width = pixels.shape
    if not settings.encoding:
        return Record(raw_datum(pixels.tobytes(), (channels, height, width), image.label, encoded=False), (height, width))
    own = os.path.splitext(image.path)[1].lower().lstrip(".").replace("jpeg", "jpg")
    wanted = settings.encoding if settings.encoding != "auto" else own if own in ("jpg", "png") else "png"
    if own != wanted or settings.size is not None:
        content = encode_image(np.asarray(pixels), wanted)
    return Record(pb.Datum(data=content, label=image.label, encoded=True).SerializeToString(), (height, width))


def raw_datum(planes: bytes, shape: Sequence[int], label: int, *, encoded: bool | None = None) -> bytes:
    """A Datum of raw planes. convert_imageset writes `encoded` even when it is false, the MNIST and CIFAR converters leave it out."""
    channels, height, width = shape
    datum = pb.Datum(channels=channels, height=height, width=width, data=planes, label=label)
    if encoded is not None:
        datum.encoded = encoded
    return datum.SerializeToString()


class Decoder:
    """Makes records with `workers` processes, or without any if there is only one or few images. Close it."""

    def __init__(self, settings: Settings, workers: int) -> None:
        self.settings, self.workers = settings, workers
        self._idle: SimpleQueue[_Worker] | None = None
        self._started: list[_Worker] = []

    def make(self, images: Sequence[ImageFile]) -> Iterator[Record | Failure]:
        """The records of all images in their order."""
        if self.workers <= 1 or len(images) <= _FEW:
            return (make_record(image, self.settings) for image in images)
        return self._parallel([images[i : i + _CHUNK] for i in range(0, len(images), _CHUNK)])

    def _parallel(self, chunks: Sequence[Sequence[ImageFile]]) -> Iterator[Record | Failure]:
        if self._idle is None:
            self._started = [_Worker(self.settings) for _ in range(self.workers)]
            self._idle = SimpleQueue()
            for worker in self._started:
                self._idle.put(worker)
        with ThreadPoolExecutor(self.workers, "decode") as threads:
            pending: deque[Future[list[Record | Failure]]] = deque()
            try:
                for chunk in chunks:
                    pending.append(threads.submit(self._convert, self._idle, chunk))
                    if len(pending) > 2 * self.workers:
                        yield from pending.popleft().result()
                while pending:
                    yield from pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

    def _convert(self, idle: SimpleQueue[_Worker], images: Sequence[ImageFile]) -> list[Record | Failure]:
        worker = idle.get()
        try:
            return worker.convert(images)
        finally:
            idle.put(worker)

    def close(self) -> None:
        """Ends the processes."""
        for worker in self._started:
            worker.close()


class _Worker:
    """A child process that makes records."""

    def __init__(self, settings: Settings) -> None:
        home = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(part for part in (home, os.environ.get("PYTHONPATH", "")) if part)
        # A session of its own: Ctrl-C reaches the program, which then ends its workers.
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from caffelite.data.decoding import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        assert self._process.stdin
        assert self._process.stdout
        self._requests, self._answers = self._process.stdin, self._process.stdout
        pickle.dump(settings, self._requests, pickle.HIGHEST_PROTOCOL)

    def convert(self, images: Sequence[ImageFile]) -> list[Record | Failure]:
        """The records of some images. DataError when the process has ended."""
        try:
            pickle.dump([tuple(image) for image in images], self._requests, pickle.HIGHEST_PROTOCOL)
            self._requests.flush()
            entries: list[tuple[int, tuple[int, int]] | tuple[str, str]] = pickle.load(self._answers)
            return [_received(self._answers, *entry) for entry in entries]
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            message = f"a decoding process ended (exit status {self._process.poll()})"
            raise DataError(message, hint="was memory short? try with --threads 1") from error

    def close(self) -> None:
        """Ends the process, which stops at the end of its input."""
        with suppress(OSError):
            self._requests.close()
        self._answers.close()
        self._process.wait()


def _received(answers: Any, first: int | str, second: Any) -> Record | Failure:
    """What a worker says of one image: how many bytes its record has, which are read, and the image's size; or a failure's fields."""
    return Failure(first, second) if isinstance(first, str) else Record(answers.read(first), second)


def serve() -> None:
    """A worker: reads Settings and then lists of images, answers each with lengths and sizes (or failures) and then the records themselves."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    try:
        settings: Settings = pickle.load(requests)
        while True:
            made = [make_record(ImageFile(*image), settings) for image in pickle.load(requests)]
            entries = [(len(record.data), record.size) if isinstance(record, Record) else tuple(record) for record in made]
            pickle.dump(entries, answers, pickle.HIGHEST_PROTOCOL)
            for record in made:
                if isinstance(record, Record):
                    answers.write(record.data)
            answers.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)  # the program has what it wanted, or is gone
