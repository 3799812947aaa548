"""Converts data sets into LMDBs laid out as Caffe's tools write them."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from caffelite.data import importers
from caffelite.data.decoding import Decoder, Failure, Record, Settings, raw_datum
from caffelite.data.importers import Part, Plan
from caffelite.data.lmdb_source import LONGEST_KEY, Database, Writer
from caffelite.data.order import class_by_class
from caffelite.errors import DataError, SpecError, Where
from caffelite.files import sync_directory, write_atomically
from caffelite.machine import processors

KINDS = ("imagefolder", "list", "tiny-imagenet", "mnist", "cifar10")
ENCODINGS = ("png", "jpg")
COMMIT = 1000  # records in one transaction
_COMMIT_BYTES = 128 * 2**20
_OWNER = "owner.lock"
Progress = Callable[[int, int], object]


@dataclass
class DatabaseReport:
    """One database: its folder, how many records, and the SHA-256 over all keys and values, as read back from disk.

    class_by_class: all records of a class follow each other, and there are several classes of several.
    """

    path: str
    count: int
    checksum: str
    class_by_class: bool = False


@dataclass
class ConvertReport:
    """What was written, the files that could not be used with the reasons, and how long it took.

    classes: the folders that an imagefolder's labels stand for. sizes: every (height, width) among images that came from files.
    """

    databases: list[DatabaseReport] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    classes: list[str] = field(default_factory=list)
    sizes: set[tuple[int, int]] = field(default_factory=set)

    @property
    def count(self) -> int:
        """Records in all databases."""
        return sum(database.count for database in self.databases)

    @property
    def checksum(self) -> str:
        """The one database's checksum, or for several that of their checksums one after another."""
        if len(self.databases) == 1:
            return self.databases[0].checksum
        return hashlib.sha256("".join(database.checksum for database in self.databases).encode()).hexdigest()


def convert_dataset(
    kind: str,
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    resize: tuple[int, int] | None = None,
    gray: bool = False,
    encoded: bool = False,
    encode_type: str = "",
    shuffle: bool = False,
    seed: int = 0,
    threads: int | None = None,
    split: str | None = None,
    allow_bad: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    tell: Callable[[str], object] = lambda text: None,
) -> ConvertReport:
    """Writes the data set at `src` as LMDB. kind: one of KINDS.

    imagefolder and list become the database `dst`; tiny-imagenet, mnist and cifar10 become dst/train_lmdb and dst/val_lmdb (test_lmdb
    for the last two), or only the one that `split` names, with labels.txt (class names in label order) and words.txt beside them.
    root: what a list's paths are relative to (its own folder if None). resize: (height, width). gray: one channel. encoded: store
    image files instead of planes, of kind encode_type ("png", "jpg"; "" keeps each file's kind, untouched where possible). shuffle:
    in an order drawn from `seed`. threads: decoding processes (None: as many as there are CPUs). force: replace existing databases.
    progress(done, total) is called now and then; tell(text) hears, before anything is written, of a source that looks like another.

    DataError when the source cannot be read, when files are unreadable (its hint lists them) unless allow_bad, when a database exists
    already, and when one cannot be written. A database appears under its name only when it is whole, on disk, and read back.
    """
    start = time.monotonic()
    settings = _settings(kind, resize, gray, encoded, encode_type)
    plan = _plan(kind, Path(src), None if root is None else Path(root), split)
    if kind == "imagefolder" and (doubt := importers.doubtful_level(Path(src), plan.classes)):
        tell(doubt)
    if kind == "tiny-imagenet" and not split and [part.name for part in plan.parts] == ["train"]:
        tell(f"{src} has neither val/val_annotations.txt nor a folder of each class in val: no database for validation is written")
    targets = [_target(Path(dst), part) for part in plan.parts]
    for target in targets:
        _refuse_existing(target, force)
    if any(part.pixels is not None for part in plan.parts) and (resize or encoded or encode_type or (gray and kind != "mnist")):
        raise SpecError(f"resize, gray and encoded do not go with {kind} files", hint="they are stored as they are; resize or convert the images first")
    job = _Job(
        settings, threads or processors(), np.random.default_rng(seed) if shuffle else None, allow_bad, force, progress, sum(_size(part) for part in plan.parts)
    )
    try:
        for part, target in zip(plan.parts, targets):
            job.write(part, target)
    finally:
        job.decoder.close()
    if kind != "list":
        _write_names(Path(dst), plan, beside=kind == "imagefolder")
    job.report.classes = plan.classes if kind == "imagefolder" else []
    job.report.seconds = time.monotonic() - start
    return job.report


def _settings(kind: str, resize: tuple[int, int] | None, gray: bool, encoded: bool, encode_type: str) -> Settings:
    encoding = encode_type.lower().lstrip(".").replace("jpeg", "jpg")
    if encoding and encoding not in ENCODINGS:
        raise SpecError(f"cannot encode as '{encode_type}'", hint=f"choose one of {', '.join(ENCODINGS)}")
    if resize is not None and min(resize) <= 0:
        raise SpecError(f"cannot resize to {resize[0]}x{resize[1]}", hint="height and width are positive")
    return Settings(1 if gray or kind == "mnist" else 3, resize, encoding or ("auto" if encoded else ""))


def _plan(kind: str, source: Path, root: Path | None, split: str | None) -> Plan:
    if kind not in KINDS:
        raise SpecError(f"unknown kind of data set '{kind}'", hint=f"choose one of {', '.join(KINDS)}")
    if not source.exists():
        raise DataError("no such file or folder", where=Where(str(source)), hint=f"is the path right, seen from {os.getcwd()}?")
    if kind == "list":
        plan = importers.image_list(source, root)
    else:
        find = {"imagefolder": importers.image_folder, "tiny-imagenet": importers.tiny_imagenet, "mnist": importers.mnist, "cifar10": importers.cifar10}
        plan = find[kind](source)
    names = [part.name for part in plan.parts]
    if split is not None:
        if split not in names:
            found = ", ".join(name for name in names if name) or "a single unnamed part"
            raise DataError(f"it has no part '{split}', found {found}", where=Where(str(source)))
        plan.parts = [part for part in plan.parts if part.name == split]
    return plan


def _target(destination: Path, part: Part) -> Path:
    return destination / f"{part.name}_lmdb" if part.name else destination


def _refuse_existing(target: Path, force: bool) -> None:
    if os.path.lexists(target) and not force and not (target.is_dir() and not os.listdir(target)):
        raise DataError("it exists already", where=Where(str(target)), hint="choose another name, remove it, or replace it with --force")
    if force and target.exists() and not _is_database(target):
        raise DataError("it exists and is not a database, so it is not replaced", where=Where(str(target)), hint="choose another name")


def _is_database(target: Path) -> bool:
    return target.is_dir() and set(os.listdir(target)) <= {"data.mdb", "lock.mdb", _OWNER}


def _size(part: Part) -> int:
    return len(part.files) if part.pixels is None else len(part.pixels)


def _class_by_class(part: Part) -> bool:
    labels = [image.label for image in part.files] if part.labels is None else part.labels.tolist()
    return len(labels) > len(set(labels)) and class_by_class(labels)


def _write_names(destination: Path, plan: Plan, beside: bool) -> None:
    """labels.txt and words.txt; for a single database beside it, named after it."""
    for what, lines in (("labels.txt", plan.classes), ("words.txt", plan.words)):
        if lines:
            _write_lines(destination.with_name(f"{destination.name}.{what}") if beside else destination / what, lines)


def _write_lines(path: Path, lines: list[str]) -> None:
    content = "".join(f"{line}\n" for line in lines).encode()
    write_atomically(path, lambda file: file.write(content))


class _Job:
    """One conversion: writes database after database and adds up the report."""

    def __init__(
        self, settings: Settings, workers: int, rng: np.random.Generator | None, allow_bad: bool, force: bool, progress: Progress | None, total: int
    ) -> None:
        self.decoder, self.rng, self.allow_bad, self.force = Decoder(settings, workers), rng, allow_bad, force
        self.progress, self.total = progress, total
        self.report = ConvertReport()
        self._done = 0

    def write(self, part: Part, target: Path) -> None:
        """Writes one database and reads it back."""
        with _beside(target, self.force) as partial:
            digest = hashlib.sha256()
            writer = Writer(str(partial))
            try:
                count = self._fill(writer, part, digest)
                writer.finish()
            finally:
                writer.close()
            if self.report.bad and not self.allow_bad:
                raise _bad_images(self.report.bad, target)
            if count == 0:
                raise DataError("there is no image to write", where=Where(str(target)))
            _verify(partial, count, digest.hexdigest(), target)
        self.report.databases.append(DatabaseReport(str(target), count, digest.hexdigest(), self.rng is None and _class_by_class(part)))

    def _fill(self, writer: Writer, part: Part, digest: hashlib._Hash) -> int:
        batch: list[tuple[bytes, bytes]] = []
        count = size = 0
        for key, value in self._records(part):
            digest.update(key)
            digest.update(value)
            batch.append((key, value))
            count, size = count + 1, size + len(value)
            if len(batch) == COMMIT or size >= _COMMIT_BYTES:
                writer.put(batch)
                batch, size = [], 0
        writer.put(batch)
        return count

    def _records(self, part: Part) -> Iterator[tuple[bytes, bytes]]:
        order = (np.arange(_size(part)) if self.rng is None else self.rng.permutation(_size(part))).tolist()
        records = self._raw(part, order) if part.pixels is not None else self._from_files(part, order)
        for done, record in enumerate(records, self._done + 1):
            if self.progress is not None and (done % 50 == 0 or done == self.total):
                self.progress(done, self.total)
            if record is not None:
                yield record
        self._done += _size(part)

    def _raw(self, part: Part, order: list[int]) -> Iterator[tuple[bytes, bytes]]:
        assert part.pixels is not None
        assert part.labels is not None
        for index, number in enumerate(order):
            yield b"%0*d" % (part.digits, index), raw_datum(part.pixels[number].tobytes(), part.pixels.shape[1:], int(part.labels[number]))

    def _from_files(self, part: Part, order: list[int]) -> Iterator[tuple[bytes, bytes] | None]:
        files = [part.files[number] for number in order]
        for index, (image, made) in enumerate(zip(files, self.decoder.make(files))):
            key = b"%08d_%b" % (index, os.fsencode(image.name))
            if len(key) > LONGEST_KEY:
                made = Failure(image.path, f"its name is too long: the key has {len(key)} bytes, LMDB allows {LONGEST_KEY}")
            yield self._noted(key, made)

    def _noted(self, key: bytes, made: Record | Failure) -> tuple[bytes, bytes] | None:
        if isinstance(made, Failure):
            self.report.bad.append((made.path, made.reason))
            return None
        self.report.sizes.add(made.size)
        return key, made.data


def _bad_images(bad: list[tuple[str, str]], target: Path) -> DataError:
    listed = "\n  ".join(f"{path}: {reason}" for path, reason in bad[:10])
    more = f"\n  and {len(bad) - 10} more" if len(bad) > 10 else ""
    return DataError(
        f"not written: {len(bad)} image(s) cannot be used", where=Where(str(target)), hint=f"{listed}{more}\n  remove them, or leave them out with --allow-bad"
    )


# --- databases that are never half-written ---------------------------------------------------------------------------------


@contextmanager
def _beside(target: Path, force: bool) -> Iterator[Path]:
    """A folder beside `target` that becomes `target` when the block ends well and vanishes when it does not."""
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        partial.mkdir()
        owner = os.open(partial / _OWNER, os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise DataError(f"cannot be written: {error.strerror or error}", where=Where(str(partial)), hint="choose a folder you can write to") from error
    try:
        fcntl.flock(owner, fcntl.LOCK_EX)  # ends with this process, however it ends
        yield partial
        _put_in_place(partial, target, force)
    except OSError as error:
        raise DataError(f"cannot be written: {error.strerror or error}", where=Where(str(target)), hint="is the disk full?") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(owner)


def _put_in_place(partial: Path, target: Path, force: bool) -> None:
    for name in ("data.mdb", "lock.mdb"):
        with open(partial / name, "rb") as file:
            os.fsync(file.fileno())
    sync_directory(partial)
    _refuse_existing(target, force)
    old = target.with_name(f"{target.name}.replaced-{os.getpid()}")
    if target.is_dir() and os.listdir(target):
        target.rename(old)
    partial.rename(target)
    (target / _OWNER).unlink()
    sync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _remove_stale(target: Path) -> None:
    """Removes what killed conversions to `target` left: folders of ours whose lock nobody holds."""
    for path in target.parent.glob(f"{_literal(target.name)}.partial-*"):
        try:
            owner = os.open(path / _OWNER, os.O_RDWR)
        except OSError:
            continue  # not ours to judge
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path)
        except BlockingIOError:
            pass  # another conversion is at work
        finally:
            os.close(owner)


def _literal(name: str) -> str:
    """`name` for Path.glob, taken literally."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _verify(folder: Path, count: int, checksum: str, target: Path) -> None:
    """DataError unless the database holds what was written."""
    digest = hashlib.sha256()
    with Database(folder) as database:
        reader = database.reader()
        for key, value in reader.read(range(database.count), ordered=True):
            digest.update(key)
            digest.update(value)
        reader.close()
        found = database.count
    if found != count or digest.hexdigest() != checksum:
        raise DataError(f"read back {found} records, wrote {count}, or they differ", where=Where(str(target)), hint="is the disk failing?")
