"""LMDB: the only file that imports lmdb. Reading and writing of databases as Caffe lays them out: one unnamed table, byte-ordered keys."""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import lmdb

from caffelite.data.mdb_check import check_mdb
from caffelite.errors import DataError, Where

Value = memoryview
FIRST_MAP = 10 * 2**20  # bytes; doubled when full
LONGEST_KEY = 511  # LMDB's limit
LOCK_FILE = 8192  # bytes: the lock file of an environment with LMDB's default of 126 readers
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # LMDB reports a write that was cut short as EIO

_open: dict[tuple[int, int], tuple[Any, int]] = {}  # (device, inode) of a data file: its environment and how many use it
_open_lock = threading.Lock()
_ended: deque[tuple[int, int]] = deque()  # data files that a user is done with, to be noted in _open


def data_file(path: str) -> str:
    """The data file of the LMDB at `path`, a folder or the file itself. DataError when there is none."""
    if os.path.isfile(path):
        return path
    file = os.path.join(path, "data.mdb")
    if os.path.isfile(file):
        return file
    if looks_like_leveldb(path):
        raise DataError(
            "this is a LevelDB, expected an LMDB",
            where=Where(path),
            hint="convert the images again with `caffelite convert`, which writes LMDB (or with Caffe's convert_imageset -backend lmdb)",
        )
    if os.path.isdir(path):
        if not os.access(path, os.R_OK | os.X_OK):
            raise DataError("this folder cannot be read: Permission denied", where=Where(path), hint="give yourself the right to read it")
        raise DataError("this folder holds no LMDB (no data.mdb)", where=Where(path), hint=_near_databases(path))
    raise DataError("no such database", where=Where(path), hint=_missing_hint(path))


def looks_like_leveldb(path: str) -> bool:
    """True for a folder with LevelDB's CURRENT file."""
    return os.path.isfile(os.path.join(path, "CURRENT"))


def _near_databases(path: str) -> str:
    try:
        inner = sorted(name for name in os.listdir(path) if os.path.isfile(os.path.join(path, name, "data.mdb")))
    except OSError:
        inner = []
    return f"it has {', '.join(inner[:4])} inside: name one of them" if inner else "make one with `caffelite convert`"


def _missing_hint(path: str) -> str:
    here = "" if os.path.isabs(path) else f" (the path is taken from {os.getcwd()})"
    return f"make it with `caffelite convert`, or correct the path{here}"


class Database:
    """An LMDB opened for reading. Any number of processes and of Database objects may read one database.

    Opening checks the file (mdb_check), so that a damaged one is a DataError here and not a crash later.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        file = data_file(self.path)
        status = os.stat(file)
        key = (status.st_dev, status.st_ino)
        self.identity = (*key, status.st_mtime_ns)  # the same for all Databases of one file
        self._environment = _acquire(key, file, self.path)
        self._finalizer = weakref.finalize(self, _release, key)
        self._finalizer.atexit = False
        self.count: int = self._environment.stat()["entries"]

    def reader(self) -> Reader:
        """A reader with a view of its own, for one thread."""
        return Reader(self._environment, self.path, self.count)

    def close(self) -> None:
        """Closes the file once its last user is done. Readers and the values they gave must no longer be used."""
        self._finalizer()

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


def _acquire(key: tuple[int, int], file: str, path: str) -> Any:
    """The environment of a data file. lmdb must not open one file twice in a process, so environments are shared."""
    try:
        with _open_lock:
            environment, users = _open.get(key, (None, 0))
            if environment is None:
                check_mdb(file, path)
                environment = _environment(file, path)
            _open[key] = (environment, users + 1)
            return environment
    finally:
        _settle()


def _environment(file: str, path: str) -> Any:
    try:
        # No lock file: nobody writes a finished database, and it may lie on a read-only disk.
        return lmdb.open(file, subdir=False, readonly=True, create=False, lock=False)
    except lmdb.Error as error:
        raise DataError(f"LMDB cannot open it: {error}", where=Where(path), hint="it may be damaged: convert the images again") from error


def _release(key: tuple[int, int]) -> None:
    """Notes that a user is done. The garbage collector may call this at any moment, also while this very thread holds the lock."""
    _ended.append(key)
    _settle()


def _settle() -> None:
    """Closes what nobody uses any more. Whoever holds the lock comes by here afterwards, so nobody need wait for it."""
    while _ended and _open_lock.acquire(blocking=False):
        try:
            while _ended:
                key = _ended.popleft()
                environment, users = _open[key]
                if users > 1:
                    _open[key] = (environment, users - 1)
                else:
                    del _open[key]
                    environment.close()
        finally:
            _open_lock.release()


class Reader:
    """Reads records by their number in key order. Values are views into the mapped file, valid until close()."""

    def __init__(self, environment: Any, path: str, count: int) -> None:
        self.path, self.count = path, count
        self._transaction = environment.begin(buffers=True)
        self._cursor = self._transaction.cursor()
        self._at = -1
        self._keys: list[bytes] | None = None

    def read(self, numbers: Sequence[int], ordered: bool) -> Iterator[tuple[bytes, Value]]:
        """Keys and values of the records with these numbers. ordered: they follow each other, wrapping at the end.

        DataError when LMDB finds the database damaged."""
        try:
            yield from self._walk(numbers) if ordered else self._pick(numbers)
        except lmdb.Error as error:
            raise DataError(f"LMDB cannot read on: {error}", where=Where(self.path), hint="the database is damaged: convert the images again") from error

    def _walk(self, numbers: Sequence[int]) -> Iterator[tuple[bytes, Value]]:
        cursor = self._cursor
        for number in numbers:
            if number != self._at + 1:
                cursor.first()
                for _ in range(number):
                    cursor.next()
            else:
                cursor.next()
            self._at = number
            yield bytes(cursor.key()), cursor.value()

    def _pick(self, numbers: Sequence[int]) -> Iterator[tuple[bytes, Value]]:
        if self._keys is None:
            self._keys = [bytes(key) for key in self._transaction.cursor().iternext(values=False)]
        for number in numbers:
            key = self._keys[number]
            yield key, self._transaction.get(key)

    def close(self) -> None:
        """Ends this reader's view."""
        self._cursor.close()
        self._transaction.abort()


def _reserve_lock_file(path: str) -> None:
    """Gives LMDB's lock file its room on the disk: LMDB writes it through a memory map, where a full disk is a signal that kills."""
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, LOCK_FILE)


class Writer:
    """Writes a new LMDB in folder `path`, which must exist, in growing keys. Call put() with batches, then finish().

    Every put() is one transaction. DataError for a full disk and whatever else LMDB reports; close() is due in any case.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            _reserve_lock_file(os.path.join(path, "lock.mdb"))
            self._environment = lmdb.open(path, map_size=FIRST_MAP, sync=False, metasync=False)
        except (lmdb.Error, OSError) as error:
            raise self._failure(error) from error

    def put(self, records: Iterable[tuple[bytes, bytes]]) -> None:
        """Adds records in one transaction, doubling the map until they fit."""
        batch = list(records)
        try:
            while not self._try(batch):
                self._environment.set_mapsize(2 * self._environment.info()["map_size"])
        except (lmdb.Error, OSError, MemoryError) as error:
            raise self._failure(error) from error

    def _try(self, batch: list[tuple[bytes, bytes]]) -> bool:
        try:
            with self._environment.begin(write=True) as transaction, transaction.cursor() as cursor:
                _, added = cursor.putmulti(batch, append=True, overwrite=False)
                if added != len(batch):
                    raise DataError("keys are not in growing order", where=Where(self.path))
        except lmdb.MapFullError:
            return False
        return True

    def finish(self) -> None:
        """Flushes everything to disk and closes."""
        try:
            self._environment.sync(True)
        except (lmdb.Error, OSError) as error:
            raise self._failure(error) from error
        self.close()

    def close(self) -> None:
        """Closes without flushing; harmless after finish()."""
        self._environment.close()

    def _failure(self, error: BaseException) -> DataError:
        full = isinstance(error, lmdb.DiskError) or any(os.strerror(number) in str(error) for number in _FULL)
        hint = "the disk or quota may be full: make room and start again" if full else "is the folder writable, and is there room on the disk?"
        return DataError(f"the database cannot be written: {error}", where=Where(self.path), hint=hint)
