"""Finds the images of a data set and their labels: folders, lists, Tiny ImageNet, MNIST, CIFAR-10."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from caffelite.data.decoding import ImageFile
from caffelite.errors import DataError, Where

ENDINGS = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"))
_LARGEST_LABEL = 2**24
_NUMBERS = re.compile("([0-9]+)")


@dataclass
class Part:
    """One database to write. Either `files` or `pixels` with `labels`.

    name: "train", "val" or "test" of a set with several parts, else "". pixels: (N,C,H,W) uint8 as they are stored, with running
    numbers of `digits` digits as keys.
    """

    name: str
    files: Sequence[ImageFile] = ()
    pixels: npt.NDArray[np.uint8] | None = None
    labels: npt.NDArray[np.int64] | None = None
    digits: int = 8


@dataclass
class Plan:
    """A data set: its parts, the class names in label order, and their wordings if there are any."""

    parts: list[Part]
    classes: list[str]
    words: list[str] | None = None


# --- folders and lists ---------------------------------------------------------------------------------------------------


def image_folder(source: Path) -> Plan:
    """source/CLASS/**/IMAGE; classes in the order of wnids.txt if there is one, else sorted by name."""
    _need_folder(source)
    classes = _wnids(source) or sorted(entry.name for entry in os.scandir(source) if entry.is_dir() and not entry.name.startswith("."))
    files = [image for label, name in enumerate(classes) for image in _images(str(source / name), name, label)]
    if not files:
        raise DataError("found no images", where=Where(str(source)), hint=f"expected {source}/CLASS/IMAGE.jpg (or .png, ...), one folder a class")
    return Plan([Part("", files)], classes)


def doubtful_level(source: Path, classes: Sequence[str]) -> str | None:
    """What to say where the folders taken for classes hold folders alone, several at least in one of them: the classes of a set in parts, it seems."""
    inside = [list(os.scandir(source / name)) for name in classes]
    if any(entry.is_file() and os.path.splitext(entry.name)[1].lower() in ENDINGS for entries in inside for entry in entries):
        return None
    folders = [sum(entry.is_dir() for entry in entries) for entries in inside]
    if max(folders, default=0) < 2:
        return None  # CLASS/images/IMAGE
    fullest = source / classes[folders.index(max(folders))]
    return (
        f"{source}: the {len(classes)} folders taken for classes ({_listed(classes)}) hold no images but folders, up to {max(folders)}; "
        f"if those are the classes, convert each part by itself, {fullest} say"
    )


def _listed(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def image_list(source: Path, root: Path | None = None) -> Plan:
    """Lines "PATH LABEL" (split at the last space), paths relative to `root` or else to the list's own folder."""
    text = _text(source, 'expected lines "PATH LABEL"')
    base = source.parent if root is None else root
    files = [_line(line, number, source, base) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not files:
        raise DataError("the list is empty", where=Where(str(source)), hint='expected lines "PATH LABEL"')
    return Plan([Part("", files)], [])


def _line(line: str, number: int, source: Path, base: Path) -> ImageFile:
    name, _, label = line.strip().rpartition(" ")
    try:
        value = int(label)
    except ValueError:
        value = -1
    if not name or not 0 <= value <= _LARGEST_LABEL:
        raise DataError(f"expected PATH LABEL with a label from 0 to {_LARGEST_LABEL}, found '{line.strip()}'", where=Where(str(source), number))
    return ImageFile(str(base / name), name, value)


def _text(path: Path, expected: str) -> str:
    """The content of a text file. DataError when it cannot be read or is no text."""
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=Where(str(path)), hint=expected) from error
    except UnicodeDecodeError as error:
        raise DataError(f"this is no text in UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x})", where=Where(str(path)), hint=expected) from error


def _need_folder(source: Path) -> None:
    if not source.is_dir():
        what = "this is a file, expected a folder" if source.exists() else "no such folder"
        raise DataError(what, where=Where(str(source)), hint="unpack an archive first, and name the folder it makes" if source.exists() else None)


def _images(folder: str, prefix: str, label: int) -> Iterator[ImageFile]:
    """All image files below a folder, numbers inside names in their natural order; `prefix` becomes the beginning of their names."""
    if not os.path.isdir(folder):
        raise DataError("no such folder, though it is named as a class", where=Where(folder))
    for where, folders, names in os.walk(folder, onerror=_refuse):
        folders.sort(key=_natural)
        below = prefix + where[len(folder) :].replace(os.sep, "/")
        for name in sorted(names, key=_natural):
            if os.path.splitext(name)[1].lower() in ENDINGS and not name.startswith("."):
                yield ImageFile(f"{where}{os.sep}{name}", f"{below}/{name}", label)


def _refuse(error: OSError) -> None:
    """os.walk passes over folders that cannot be read, and with them their images, unless told otherwise."""
    raise DataError(
        f"this folder cannot be read: {error.strerror or error}", where=Where(str(error.filename)), hint="give yourself the right to read it"
    ) from error


def _natural(name: str) -> list[str | int]:
    """image_2 before image_10: texts and numbers in turn."""
    return [int(part) if i % 2 else part for i, part in enumerate(_NUMBERS.split(name))]


def _wnids(source: Path) -> list[str]:
    path = source / "wnids.txt"
    names = _text(path, "expected a class on each line").split() if path.is_file() else []
    if len(set(names)) != len(names):
        raise DataError("a class is named twice", where=Where(str(path)))
    return names


# --- Tiny ImageNet -----------------------------------------------------------------------------------------------------


def tiny_imagenet(source: Path) -> Plan:
    """train/WNID/images/*.JPEG, and val/images with val/val_annotations.txt, or val/WNID/**/*.JPEG; labels are positions in wnids.txt."""
    _need_folder(source)
    train = source / "train"
    if not train.is_dir():
        inner = [entry.name for entry in os.scandir(source) if (source / entry.name / "train").is_dir()]
        hint = f"did you mean {source / inner[0]}?" if inner else "expected wnids.txt, train/WNID/images/*.JPEG and val/val_annotations.txt"
        raise DataError("this is not laid out like Tiny ImageNet: it has no folder train", where=Where(str(source)), hint=hint)
    classes = _wnids(source) or sorted(entry.name for entry in os.scandir(train) if entry.is_dir())
    files = [image for label, name in enumerate(classes) for image in _images(str(train / name), f"train/{name}", label)]
    if not files:
        raise DataError("found no images", where=Where(str(train)), hint="expected train/WNID/images/*.JPEG")
    parts = [Part("train", files)]
    annotations = source / "val" / "val_annotations.txt"
    if annotations.is_file():
        parts.append(Part("val", _annotated(annotations, source, {name: label for label, name in enumerate(classes)})))
    elif any((source / "val" / name).is_dir() for name in classes):  # as some scripts sort them
        parts.append(Part("val", [image for label, name in enumerate(classes) for image in _images(str(source / "val" / name), f"val/{name}", label)]))
    return Plan(parts, classes, _words(source / "words.txt", classes))


def _annotated(path: Path, source: Path, labels: dict[str, int]) -> list[ImageFile]:
    files = []
    for number, line in enumerate(_text(path, "expected lines of an image and its class").splitlines(), 1):
        fields = line.split("\t") if "\t" in line else line.split()
        if not fields or not line.strip():
            continue
        if len(fields) < 2 or fields[1] not in labels:
            raise DataError(f"expected an image and a class of wnids.txt, found '{line.strip()}'", where=Where(str(path), number))
        name = f"val/images/{fields[0]}"
        files.append(ImageFile(str(source / name), name, labels[fields[1]]))
    return files


def _words(path: Path, classes: Sequence[str]) -> list[str] | None:
    if not path.is_file():
        return None
    known = dict(line.split("\t", 1) for line in _text(path, "expected lines of a class, a tab and its name").splitlines() if "\t" in line)
    return [known.get(name, name).strip() for name in classes]


# --- MNIST ---------------------------------------------------------------------------------------------------------------

_MNIST = {
    "train": ("train-images-idx3-ubyte", "train-images.idx3-ubyte", "train-labels-idx1-ubyte", "train-labels.idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-images.idx3-ubyte", "t10k-labels-idx1-ubyte", "t10k-labels.idx1-ubyte"),
}
_MNIST_FOLDERS = {"train": ("train", "training"), "test": ("test", "testing")}


def mnist(source: Path) -> Plan:
    """The four idx files (gzipped or not), or folders train(ing)/DIGIT and test(ing)/DIGIT of images."""
    _need_folder(source)
    parts = []
    for name, files in _MNIST.items():
        images, labels = _first(source, files[:2]), _first(source, files[2:])
        if images and labels:
            parts.append(_idx_part(name, images, labels))
    if not parts:
        found = ((name, source / folder) for name, folders in _MNIST_FOLDERS.items() for folder in folders if (source / folder).is_dir())
        parts = [Part(name, image_folder(folder).parts[0].files) for name, folder in found]
    if not parts:
        hint = "expected train-images-idx3-ubyte and train-labels-idx1-ubyte (.gz or not), or folders training/0 to training/9 of PNG files"
        raise DataError("found no MNIST files", where=Where(str(source)), hint=hint)
    return Plan(parts, [str(digit) for digit in range(10)])


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    return next((path for name in names for path in (folder / name, folder / (name + ".gz")) if path.is_file()), None)


def _idx_part(name: str, images: Path, labels: Path) -> Part:
    pixels, classes = _idx(images, 3), _idx(labels, 1)
    if len(pixels) != len(classes):
        raise DataError(f"{len(classes)} labels for the {len(pixels)} images of {images.name}", where=Where(str(labels)))
    return Part(name, pixels=pixels[:, None], labels=classes.astype(np.int64))


def _idx(path: Path, axes: int) -> npt.NDArray[np.uint8]:
    """An idx file of unsigned bytes: 0, 0, type 8, number of axes, then big-endian sizes, then the values."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot be read: {error}", where=Where(str(path))) from error
    start = 4 + 4 * axes
    if len(content) < start or content[:4] != bytes((0, 0, 8, axes)):
        raise DataError(f"this is not an idx file of bytes with {axes} axes", where=Where(str(path)))
    shape = struct.unpack(f">{axes}I", content[4:start])
    if len(content) - start != int(np.prod(shape, dtype=np.int64)):
        raise DataError(f"it promises {'x'.join(map(str, shape))} values, found {len(content) - start}", where=Where(str(path)), hint="download it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


# --- CIFAR-10 ------------------------------------------------------------------------------------------------------------

_CIFAR_SHAPE = (3, 32, 32)
_CIFAR_PARTS = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}


def cifar10(source: Path) -> Plan:
    """The binary (.bin) or the Python batches; planes stay red, green, blue as in the files and as Caffe's converter keeps them."""
    _need_folder(source)
    inner = [path for path in (source, source / "cifar-10-batches-bin", source / "cifar-10-batches-py") if _cifar_file(path, "test_batch")]
    if not inner:
        raise DataError("found no CIFAR-10 batches", where=Where(str(source)), hint="expected data_batch_1 to 5 and test_batch, with .bin or without")
    folder = inner[0]
    parts = []
    for name, batches in _CIFAR_PARTS.items():
        loaded = [_cifar_batch(path) for batch in batches if (path := _cifar_file(folder, batch))]
        if loaded:
            parts.append(Part(name, pixels=np.concatenate([x for x, _ in loaded]), labels=np.concatenate([y for _, y in loaded]), digits=5))
    return Plan(parts, _cifar_classes(folder))


def _cifar_file(folder: Path, batch: str) -> Path | None:
    return next((path for path in (folder / f"{batch}.bin", folder / batch) if path.is_file()), None)


def _cifar_batch(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    size = int(np.prod(_CIFAR_SHAPE))
    content = path.read_bytes()
    if path.suffix == ".bin":
        if not content or len(content) % (size + 1):
            raise DataError(f"{len(content)} bytes are no whole number of records of {size + 1}", where=Where(str(path)), hint="download it again")
        rows = np.frombuffer(content, np.uint8).reshape(-1, size + 1)
        return rows[:, 1:].reshape(-1, *_CIFAR_SHAPE), rows[:, 0].astype(np.int64)
    try:
        batch = _SafeUnpickler(io.BytesIO(content), encoding="bytes").load()
        pixels, labels = np.asarray(batch[b"data"], np.uint8), np.asarray(batch[b"labels"], np.int64)
        return pixels.reshape(-1, *_CIFAR_SHAPE), labels
    except Exception as error:  # a pickle can fail in any way
        raise DataError(f"this is not a CIFAR-10 Python batch: {error}", where=Where(str(path)), hint="download it again") from error


class _SafeUnpickler(pickle.Unpickler):
    """Reads arrays of numbers and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {"_reconstruct", "ndarray", "dtype", "_frombuffer", "encode"}
        if module.split(".")[0] in ("numpy", "_codecs") and name in allowed:
            return super().find_class(module.replace("numpy.core", "numpy._core") if hasattr(np, "_core") else module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _cifar_classes(folder: Path) -> list[str]:
    path = folder / "batches.meta.txt"
    if path.is_file():
        return _text(path, "expected a class on each line").split()
    return ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
