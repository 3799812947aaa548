"""The drawn data set: its files, that a seed repeats it, and that its classes are learnable but not linearly separable."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from caffelite.data import synth
from caffelite.errors import DataError, SpecError

Images = NDArray[np.float64]  # (n, 64, 64, 3), 0 to 1


def digest(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*")) if p.is_file()}


def test_layout_is_tiny_imagenets(tmp_path: Path) -> None:
    seen = []
    report = synth.generate(tmp_path / "set", classes=3, train_per_class=52, val_per_class=2, size=32, progress=lambda done, total: seen.append((done, total)))
    assert report == synth.SynthReport(("ring", "stripes", "star"), 156, 6)
    assert seen[-1] == (162, 162)
    assert seen == sorted(seen)
    root = tmp_path / "set"
    assert (root / "wnids.txt").read_text() == "n90000000\nn90000001\nn90000002\n"
    assert (root / "words.txt").read_text().splitlines()[2] == "n90000002\tstar"
    for folder in ("n90000000", "n90000001", "n90000002"):
        names = [f"{folder}_{i}.JPEG" for i in range(52)]
        assert sorted(p.name for p in (root / "train" / folder / "images").iterdir()) == sorted(names)
        boxes = [line.split("\t") for line in (root / "train" / folder / f"{folder}_boxes.txt").read_text().splitlines()]
        assert [row[0] for row in boxes] == names
        assert all(0 <= int(r[1]) <= int(r[3]) < 32 and 0 <= int(r[2]) <= int(r[4]) < 32 for r in boxes)
    rows = [line.split("\t") for line in (root / "val" / "val_annotations.txt").read_text().splitlines()]
    assert [row[0] for row in rows] == [f"val_{i}.JPEG" for i in range(6)]
    assert [row[1] for row in rows] == ["n90000000", "n90000001", "n90000002"] * 2
    assert sorted(p.name for p in (root / "val" / "images").iterdir()) == [row[0] for row in rows]
    with Image.open(root / "val" / "images" / "val_5.JPEG") as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 32))
    assert [p.name for p in tmp_path.iterdir()] == ["set"]  # nothing left beside it


def test_box_holds_the_figure() -> None:
    cover = np.zeros((2, 16, 16), np.float32)
    cover[0, 3:7, 5:12] = 0.6
    cover[0, 0, 0] = 0.4  # less than half covered
    assert synth._boxes(cover).tolist() == [[5, 3, 11, 6], [0, 0, 15, 15]]


def test_seed_decides_every_byte_and_threads_none(tmp_path: Path) -> None:
    small = {"classes": 4, "train_per_class": 51, "val_per_class": 3, "size": 24}
    synth.generate(tmp_path / "a", seed=7, threads=1, **small)
    synth.generate(tmp_path / "b", seed=7, threads=3, **small)
    synth.generate(tmp_path / "c", seed=8, threads=3, **small)
    a, b, c = (digest(tmp_path / name) for name in "abc")
    assert a == b
    images = [name for name in a if name.endswith(".JPEG")]
    assert len(images) == len({a[name] for name in images}) == 4 * 54  # no image twice, not across splits either
    assert all(a[name] != c[name] for name in images)


def test_leftovers_of_a_killed_run_are_cleared(tmp_path: Path) -> None:
    partial = tmp_path / ".set.partial"
    (partial / "val").mkdir(parents=True)
    (partial / "val" / "old.JPEG").write_bytes(b"half")
    synth.generate(tmp_path / "set", classes=2, train_per_class=1, val_per_class=1, size=16)
    assert not partial.exists()
    assert not (tmp_path / "set" / "val" / "old.JPEG").exists()


def test_a_failure_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synth.generate(tmp_path / "set", classes=2, train_per_class=1, val_per_class=1, size=16, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"classes must be 2 to 20, found 21"):
        synth.generate(tmp_path / "set", classes=21)
    with pytest.raises(SpecError, match=r"size must be 16 to 512, found 8"):
        synth.generate(tmp_path / "set", size=8)
    with pytest.raises(DataError, match=r"exists already\n  remove it, or name another folder"):
        synth.generate(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write .*file.*: Not a directory\n  choose a folder"):
        synth.generate(tmp_path / "file" / "set")


# --- what can be learned -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled() -> tuple[Images, NDArray[np.int64], Images, NDArray[np.int64]]:
    """60 training and 25 test images of each of the 20 classes."""
    names = synth.class_names(20)
    sets = []
    for split, count in ((0, 60), (1, 25)):
        drawn = [synth.draw(name, count, 64, np.random.default_rng([3, split, i]))[0] for i, name in enumerate(names)]
        sets += [np.concatenate(drawn) / 255.0, np.repeat(np.arange(20), count)]
    return sets[0], sets[1], sets[2], sets[3]


def ridge_accuracy(train: NDArray[np.float64], labels: NDArray[np.int64], test: NDArray[np.float64], answers: NDArray[np.int64], penalty: float) -> float:
    """Least squares onto one-hot labels with an L2 penalty, in the dual form; features standardised."""
    mean, deviation = train.mean(0), train.std(0) + 1e-9
    train, test = (train - mean) / deviation, (test - mean) / deviation
    kernel = train @ train.T / train.shape[1]
    weights = np.linalg.solve(kernel + penalty * np.eye(len(train)), np.eye(20)[labels])
    return float(np.mean((test @ train.T / train.shape[1] @ weights).argmax(1) == answers))


def shrunk(images: Images) -> NDArray[np.float64]:
    """16 x 16 block means of the three planes: linear in the pixels."""
    return images.reshape(len(images), 16, 4, 16, 4, 3).mean(axis=(2, 4)).reshape(len(images), -1)


def gradient_statistics(images: Images) -> NDArray[np.float64]:
    """Edge strength over distance: the spectrum of the gradient's size, pooled over direction, and how edges turn."""
    grey = images.mean(3)
    dy, dx = np.gradient(grey, axis=(1, 2))
    size = np.hypot(dx, dy)
    total = size.sum((1, 2), keepdims=True)
    angle = np.arctan2(dy, dx)
    rows = [np.log(total[:, 0])]
    rows += [np.abs((size * np.exp(1j * k * angle)).sum((1, 2)) / total[:, 0, 0])[:, None] for k in (1, 2, 3, 4, 5, 6, 8)]
    power = np.abs(np.fft.fft2(size / total)) ** 2
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(64) * 64, np.fft.fftfreq(64) * 64))
    rows += [np.log(power[:, (radius >= r) & (radius < r + 2)].mean(1))[:, None] for r in range(1, 31, 2)]
    basic = np.concatenate(rows, axis=1)
    return np.concatenate([basic, basic**2], axis=1)


def test_pixels_alone_do_not_tell_the_classes(labelled: tuple[Images, NDArray[np.int64], Images, NDArray[np.int64]]) -> None:
    train, labels, test, answers = labelled
    assert ridge_accuracy(shrunk(train), labels, shrunk(test), answers, 1.0) < 0.15
    pixels, unseen = train.reshape(len(train), -1), test.reshape(len(test), -1)
    assert ridge_accuracy(pixels, labels, unseen, answers, 1.0) < 0.15


def test_mean_colour_and_brightness_do_not_tell_the_classes(labelled: tuple[Images, NDArray[np.int64], Images, NDArray[np.int64]]) -> None:
    train, labels, test, answers = labelled
    colour = [np.concatenate([x.mean((1, 2)), x.mean((1, 2)) ** 2], axis=1) for x in (train, test)]
    assert ridge_accuracy(colour[0], labels, colour[1], answers, 0.01) < 0.15
    means = np.stack([train[labels == k].mean((0, 1, 2)) for k in range(20)])
    assert np.abs(means - means.mean(0)).max() < 0.06


def test_gradients_tell_the_classes(labelled: tuple[Images, NDArray[np.int64], Images, NDArray[np.int64]]) -> None:
    train, labels, test, answers = labelled
    assert ridge_accuracy(gradient_statistics(train), labels, gradient_statistics(test), answers, 0.01) > 0.4
