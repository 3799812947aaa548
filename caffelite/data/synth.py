"""A data set to train on when none is at hand: drawn JPEG files in Tiny ImageNet's layout.

Ten classes are shapes and ten are textures. Pose, size, colours, light, clutter, blur and noise are drawn at random for
every image in the same way for every class, and a figure is as often darker as lighter than what lies around it: the mean
image of each class is the same grey, so that no linear function of the pixels tells the classes apart.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from caffelite.data.synth_patterns import SHAPES, TEXTURES, TURN, Field, Pattern, uniform
from caffelite.errors import DataError, SpecError
from caffelite.machine import processors

MAX_CLASSES = len(SHAPES) + len(TEXTURES)
CHUNK = 50  # images drawn together; part of the random stream: another number gives other images
TRAIN, VAL = 0, 1
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
Image = Any  # (n, size, size, 3) float32, 0 to 1
Colour = Any  # (n, 1, 1, 3) float32, 0 to 1
Boxes = NDArray[np.int64]  # (n, 4): left, top, right, bottom, all inclusive


@dataclass(frozen=True)
class SynthReport:
    """What was written: class names in label order, and images a split."""

    classes: tuple[str, ...]
    train: int
    val: int


@dataclass(frozen=True)
class _Task:
    """A chunk of one class and split; `first` is the number of its first image within the class."""

    split: int
    label: int
    first: int
    count: int


def class_names(classes: int) -> list[str]:
    """The first `classes` names, shapes and textures in turn."""
    return [name for pair in zip(SHAPES, TEXTURES) for name in pair][:classes]


def wnid(label: int) -> str:
    """The folder name of a class: like a WordNet number, but none that WordNet uses."""
    return f"n9{label:07d}"


def generate(
    dst: str | os.PathLike[str],
    *,
    classes: int = 20,
    train_per_class: int = 300,
    val_per_class: int = 50,
    seed: int = 0,
    size: int = 64,
    threads: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> SynthReport:
    """Draws size x size colour JPEGs under `dst`, which must not exist: wnids.txt, words.txt, train/ and val/.

    The files are a function of the arguments but `threads` and `progress`, byte for byte on one version of the libraries.
    progress(done, total) is called in the caller's thread as images are finished. `dst` appears when it is whole.

    SpecError: a count or size out of range. DataError: `dst` exists, or cannot be written.
    """
    _check(classes, train_per_class, val_per_class, size)
    final = Path(dst)
    if final.exists():
        raise DataError(f"{final} exists already", hint="remove it, or name another folder")
    partial = final.with_name(f".{final.name}.partial")
    tasks = list(_tasks(classes, train_per_class, val_per_class))
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
        _lay_out(partial, classes)
        lines = _draw_all(partial, tasks, seed, size, threads, progress)
        _write_boxes(partial, tasks, lines)
        partial.rename(final)
    except OSError as error:
        raise DataError(f"cannot write {error.filename or final}: {error.strerror or error}", hint="choose a folder with room that you can write to") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return SynthReport(tuple(class_names(classes)), classes * train_per_class, classes * val_per_class)


def _check(classes: int, train_per_class: int, val_per_class: int, size: int) -> None:
    limits = {"classes": (classes, 2, MAX_CLASSES), "train_per_class": (train_per_class, 1, 10**6), "val_per_class": (val_per_class, 1, 10**6)}
    limits["size"] = (size, 16, 512)
    for name, (value, least, most) in limits.items():
        if not least <= value <= most:
            raise SpecError(f"{name} must be {least} to {most:,}, found {value}")


def _tasks(classes: int, train: int, val: int) -> Iterator[_Task]:
    for split, per_class in ((TRAIN, train), (VAL, val)):
        for label in range(classes):
            for first in range(0, per_class, CHUNK):
                yield _Task(split, label, first, min(CHUNK, per_class - first))


# --- files -------------------------------------------------------------------------------------------------------------


def _lay_out(root: Path, classes: int) -> None:
    for label in range(classes):
        (root / "train" / wnid(label) / "images").mkdir(parents=True)
    (root / "val" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("".join(f"{wnid(i)}\n" for i in range(classes)))
    (root / "words.txt").write_text("".join(f"{wnid(i)}\t{name.replace('_', ' ')}\n" for i, name in enumerate(class_names(classes))))


def _draw_all(
    root: Path, tasks: list[_Task], seed: int, size: int, threads: int | None, progress: Callable[[int, int], object] | None
) -> dict[_Task, list[str]]:
    """Draws and writes every chunk; returns the box lines of each. NumPy and Pillow let threads run side by side."""
    classes, total, done = 1 + max(task.label for task in tasks), sum(task.count for task in tasks), 0
    lines = {}
    pool = ThreadPoolExecutor(threads or processors())
    try:
        for task, chunk in zip(tasks, pool.map(lambda task: _draw_chunk(root, task, seed, size, classes), tasks)):
            lines[task] = chunk
            done += task.count
            if progress:
                progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)
    return lines


def _draw_chunk(root: Path, task: _Task, seed: int, size: int, classes: int) -> list[str]:
    from PIL import Image as Pillow

    rng = np.random.default_rng([seed, task.split, task.label, task.first])
    pixels, boxes = draw(class_names(classes)[task.label], task.count, size, rng)
    quality = rng.integers(75, 96, task.count)
    lines = []
    for i in range(task.count):
        folder, name = _place(task, i, classes)
        encoded = BytesIO()
        Pillow.fromarray(pixels[i]).save(encoded, "JPEG", quality=int(quality[i]))
        (root / folder / name).write_bytes(encoded.getbuffer())
        lines.append("\t".join([name, *(str(edge) for edge in boxes[i])]))
    return lines


def _place(task: _Task, i: int, classes: int) -> tuple[str, str]:
    """Folder and name of image i of a chunk. Validation images share a folder; their numbers run through all classes."""
    if task.split == TRAIN:
        return f"train/{wnid(task.label)}/images", f"{wnid(task.label)}_{task.first + i}.JPEG"
    return "val/images", f"val_{(task.first + i) * classes + task.label}.JPEG"


def _write_boxes(root: Path, tasks: list[_Task], lines: dict[_Task, list[str]]) -> None:
    """Each training class's boxes file, and val_annotations.txt, which also names the class of each image."""
    train: dict[int, list[str]] = {}
    val = []
    for task in tasks:
        if task.split == TRAIN:
            train.setdefault(task.label, []).extend(lines[task])
        else:
            val += [line.replace("\t", f"\t{wnid(task.label)}\t", 1) for line in lines[task]]
    for label, rows in train.items():
        (root / "train" / wnid(label) / f"{wnid(label)}_boxes.txt").write_text("".join(f"{row}\n" for row in rows))
    val.sort(key=lambda line: int(line[len("val_") : line.index(".")]))
    (root / "val" / "val_annotations.txt").write_text("".join(f"{row}\n" for row in val))


# --- drawing -----------------------------------------------------------------------------------------------------------


def draw(name: str, count: int, size: int, rng: np.random.Generator) -> tuple[NDArray[np.uint8], Boxes]:
    """`count` images of class `name`: (count, size, size, 3) RGB bytes, and the box around each figure."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    x, y = (np.broadcast_to(plane, (count, size, size)) for plane in (axis[None, None, :], axis[None, :, None]))
    light, dark = _two_colours(count, rng)
    front, back = _swap(light, dark, rng)
    image = _background(x, y, back, rng)
    for _ in range(5):
        _clutter(image, x, y, rng)
    if name in SHAPES:
        cover = _shape(SHAPES[name], x, y, rng)
        image += cover[..., None] * (_shaded(front, x, y, rng) - image)
    else:
        cover = _patch(x, y, rng)
        figure = _texture(TEXTURES[name], x, y, rng)[..., None]
        image += cover[..., None] * (_shaded(front, x, y, rng) * figure + _shaded(back, x, y, rng) * (1 - figure) - image)
    _clutter(image, x, y, rng, width=0.05)
    return _photograph(image, x, y, rng), _boxes(cover)


def _two_colours(count: int, rng: np.random.Generator) -> tuple[Colour, Colour]:
    """A lighter and a darker colour for each image, of any hue, whose lightness differs enough to be seen."""
    middle, half = rng.uniform(0.35, 0.65, (count, 1, 1, 1)), rng.uniform(0.11, 0.28, (count, 1, 1, 1))
    return _colour(middle + half, rng), _colour(middle - half, rng)


def _colour(lightness: NDArray[np.float64], rng: np.random.Generator) -> Colour:
    hue = rng.uniform(-0.35, 0.35, (*lightness.shape[:-1], 3)).astype(np.float32)
    return np.clip(lightness.astype(np.float32) + hue - (hue @ LUMA)[..., None], 0, 1)


def _swap(light: Colour, dark: Colour, rng: np.random.Generator) -> tuple[Colour, Colour]:
    """The same two colours, each as often the first as the second."""
    keep = rng.random((len(light), 1, 1, 1)) < 0.5
    return np.where(keep, light, dark), np.where(keep, dark, light)


def _background(x: Field, y: Field, colour: Colour, rng: np.random.Generator) -> Image:
    """`colour` drifting softly into another of about its lightness."""
    other = _colour((colour @ LUMA)[..., None].astype(np.float64) + rng.uniform(-0.1, 0.1, colour[..., :1].shape), rng)
    share = 0.5 + 0.5 * np.tanh(_drift(x, y, rng, 1.5))
    return colour + share[..., None] * (other - colour)


def _drift(x: Field, y: Field, rng: np.random.Generator, pace: float) -> Field:
    """A smooth random field of about unit size, changing on a scale of 1 / pace."""
    total = np.zeros_like(x)
    for _ in range(4):
        count = len(x)
        along, across, shift = uniform(rng, count, -pace, pace), uniform(rng, count, -pace, pace), uniform(rng, count, 0, TURN)
        total += np.sin(TURN / 2 * (along * x + across * y) + shift)
    return total * 0.7


def _clutter(image: Image, x: Field, y: Field, rng: np.random.Generator, width: float = 0.3) -> None:
    """Lays one oval or bar, of any colour and up to `width` wide, over about half of the images."""
    count = len(image)
    u, v = _posed(x, y, rng, reach=1.0, stretch=1.0)
    long, short = uniform(rng, count, 0.1, 0.5), uniform(rng, count, 0.3 * width, width)
    oval = np.hypot(u / long, v / short) * np.minimum(long, short) - np.minimum(long, short)
    distance = np.where(rng.random((count, 1, 1)) < 0.5, oval, np.maximum(np.abs(u) - long, np.abs(v) - short))
    strength = np.where(rng.random((count, 1, 1)) < 0.5, uniform(rng, count, 0.3, 1.0), 0)
    image += (_cover(distance) * strength)[..., None] * (_colour(rng.uniform(0.2, 0.8, (count, 1, 1, 1)), rng) - image)


def _posed(x: Field, y: Field, rng: np.random.Generator, reach: float, stretch: float) -> tuple[Field, Field]:
    """Coordinates moved by up to `reach`, turned by any angle, and stretched one way by up to `stretch`."""
    count = len(x)
    angle, skew = uniform(rng, count, 0, TURN), uniform(rng, count, 0, TURN)
    x, y = x - uniform(rng, count, -reach, reach), y - uniform(rng, count, -reach, reach)
    factor = uniform(rng, count, 1.0, stretch)
    along = (np.cos(skew) * x + np.sin(skew) * y) * (factor - 1)
    x, y = x + along * np.cos(skew), y + along * np.sin(skew)
    return np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x


def _cover(distance: Field) -> Field:
    """How much of each pixel lies inside, 0 to 1; distances are in halves of the image's width."""
    return np.clip(0.5 - distance * (distance.shape[1] / 2), 0, 1)


def _shape(pattern: Pattern, x: Field, y: Field, rng: np.random.Generator) -> Field:
    """How much of each pixel the shape covers, 0 to 1."""
    radius = uniform(rng, len(x), 0.42, 0.8)
    u, v = _posed(x, y, rng, reach=0.3, stretch=1.4)
    return _cover(pattern(u / radius, v / radius, rng) * radius)


def _texture(pattern: Pattern, x: Field, y: Field, rng: np.random.Generator) -> Field:
    """How much of each pixel is the texture's foreground, 0 to 1."""
    period = uniform(rng, len(x), 0.24, 0.48)
    u, v = _posed(x, y, rng, reach=0.6, stretch=1.4)
    return _cover(pattern(u / period, v / period, rng) * period)


def _patch(x: Field, y: Field, rng: np.random.Generator) -> Field:
    """An irregular region around the middle that holds the texture: most of the image, seldom all of it."""
    edge = uniform(rng, len(x), 0.75, 1.3) + 0.18 * _drift(x, y, rng, 3.0)
    u, v = _posed(x, y, rng, reach=0.2, stretch=1.3)
    return _cover(np.hypot(u, v) - edge)


def _shaded(colour: Colour, x: Field, y: Field, rng: np.random.Generator) -> Image:
    """`colour`, unevenly light."""
    return colour * (1 + 0.12 * _drift(x, y, rng, 1.0))[..., None]


def _photograph(image: Image, x: Field, y: Field, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Light from one side, a little blur, noise, and rounding to bytes."""
    count = len(image)
    angle, slope = uniform(rng, count, 0, TURN), uniform(rng, count, 0, 0.3)
    image *= (1 + slope * (np.cos(angle) * x + np.sin(angle) * y))[..., None]
    blur = uniform(rng, count, 0, 1)[..., None] * 0.5
    number = np.arange(image.shape[1])
    before, after = np.maximum(number - 1, 0), np.minimum(number + 1, number[-1])
    for axis in (1, 2):
        image += blur * ((image.take(before, axis) + image.take(after, axis)) * 0.5 - image)
    noise = rng.standard_normal(image.shape, np.float32)
    image += noise * uniform(rng, count, 0.005, 0.05)[..., None]
    pixels: NDArray[np.uint8] = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
    return pixels


def _boxes(cover: Field) -> Boxes:
    """The least box around the pixels that are covered by half or more; the whole image where there are none."""
    size = cover.shape[1]
    inside = cover >= 0.5
    inside |= ~inside.any(axis=(1, 2), keepdims=True)
    columns, rows = inside.any(axis=1), inside.any(axis=2)
    edges = [columns.argmax(1), rows.argmax(1), size - 1 - columns[:, ::-1].argmax(1), size - 1 - rows[:, ::-1].argmax(1)]
    return np.stack(edges, axis=1)
