"""Looks over an LMDB file before LMDB maps it, so that a cut or scribbled file is an error and not a crash of the process.

LMDB trusts its file: a page that lies beyond the end of the file kills the process (SIGBUS), a wild offset in a page may.
The layout checked here is that of LMDB 0.9 on 64-bit little-endian machines (lmdb.h, mdb.c: MDB_page, MDB_meta, MDB_node).
"""

from __future__ import annotations

import os
import struct
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from caffelite.errors import DataError, Where

_HEADER = struct.Struct("<QHHHH")  # page number, padding, flags, lower, upper
_META = struct.Struct("<IIQQ" + "IHHQQQQQ" * 2 + "QQ")
_MAGIC, _VERSION = 0xBEEFC0DE, 1
_BRANCH, _LEAF, _META_PAGE = 0x01, 0x02, 0x08
_BIG = 0x01  # node flag: the value lies on pages of its own
_NODE = 8  # bytes of a node before its key
_NO_ROOT = 2**64 - 1
MOST_LEAVES = 20_000  # beyond, only the upper levels of the tree are looked at: half a second of work, and the file may lie on a slow disk


class Meta(NamedTuple):
    """What a meta page says."""

    page_size: int
    depth: int
    leaves: int
    entries: int
    root: int
    last_page: int
    transaction: int


def check_mdb(path: str, source: str) -> None:
    """DataError, placed at `source`, when `path` is not an LMDB data file, is cut short, or its tree of pages is damaged."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise DataError("the database file is empty", where=Where(source), hint="it was never finished: convert the images again")
        _check_pages(np.memmap(path, np.uint8, "r"), source)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=Where(source)) from error


def _check_pages(data: npt.NDArray[np.uint8], source: str) -> None:
    meta = _newest_meta(data, source)
    needed = (meta.last_page + 1) * meta.page_size
    if data.size < needed:
        raise DataError(
            f"the database is cut short: {data.size} bytes, expected at least {needed}", where=Where(source), hint="copy it again, or convert the images again"
        )
    if meta.root != _NO_ROOT:
        _Tree(data, meta, source).check()


def _newest_meta(data: npt.NDArray[np.uint8], source: str) -> Meta:
    first = _meta(data, 0)
    second = _meta(data, first.page_size) if first else None
    if first is None or second is None:
        raise DataError("this is not an LMDB database (data.mdb has no valid header)", where=Where(source), hint="it is damaged, or of another kind")
    return max(first, second, key=lambda meta: meta.transaction)


def _meta(data: npt.NDArray[np.uint8], offset: int) -> Meta | None:
    if offset + _HEADER.size + _META.size > data.size:
        return None
    if not _HEADER.unpack_from(data.data, offset)[2] & _META_PAGE:
        return None
    magic, version, _, _, page_size, *rest = _META.unpack_from(data.data, offset + _HEADER.size)
    if magic != _MAGIC or version != _VERSION or page_size < 256 or page_size & (page_size - 1):
        return None
    _, _, depth, _, leaves, _, entries, root, last_page, transaction = rest[7:]
    return Meta(page_size, depth, leaves, entries, root, last_page, transaction)


class _Tree:
    """The B+tree of records, checked page by page."""

    def __init__(self, data: npt.NDArray[np.uint8], meta: Meta, source: str) -> None:
        self.data, self.meta, self.source = data, meta, source
        self.pages = self.records = 0

    def check(self) -> None:
        """Walks the tree level by level. DataError for the first page that is wrong."""
        level = [self.meta.root]
        for depth in range(1, self.meta.depth + 1):
            if depth < self.meta.depth:
                level = [child for number in level for child in self._children(number)]
            elif self.meta.leaves <= MOST_LEAVES:
                for number in level:
                    self._leaf(number)
                if self.records != self.meta.entries:
                    raise self._damaged(f"its header promises {self.meta.entries} records, found {self.records}")

    def _damaged(self, what: str) -> DataError:
        return DataError(f"the database is damaged: {what}", where=Where(self.source), hint="copy it again, or convert the images again")

    def _nodes(self, number: int, kind: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """The bytes of a page and the offsets of its nodes."""
        size = self.meta.page_size
        if not 2 <= number <= self.meta.last_page:
            raise self._damaged(f"it refers to page {number} of {self.meta.last_page + 1}")
        page = self.data[number * size : (number + 1) * size]
        stated, _, flags, lower, upper = _HEADER.unpack_from(page.data, 0)
        if stated != number or not flags & kind or not _HEADER.size < lower <= upper <= size or lower & 1:
            raise self._damaged(f"page {number} is not what it should be")
        offsets = page[_HEADER.size : lower].view("<u2").astype(np.int64)
        if int(offsets.min()) < upper or int(offsets.max()) + _NODE > size:
            raise self._damaged(f"page {number} points outside itself")
        return page, offsets

    def _children(self, number: int) -> list[int]:
        page, offsets = self._nodes(number, _BRANCH)
        low, high, top, key = (_u16(page, offsets + 2 * i) for i in range(4))
        if int((offsets + _NODE + key).max()) > self.meta.page_size:
            raise self._damaged(f"page {number} points outside itself")
        children: list[int] = (low | high << 16 | top << 32).tolist()
        self.pages += len(children)
        if self.pages > self.meta.last_page:
            raise self._damaged("its pages refer to each other in a circle")
        return children

    def _leaf(self, number: int) -> None:
        page, offsets = self._nodes(number, _LEAF)
        self.records += len(offsets)
        low, high, flags, key = (_u16(page, offsets + 2 * i) for i in range(4))
        length, big = low | high << 16, flags == _BIG
        if int(flags.max()) > _BIG:
            raise self._damaged(f"page {number} holds tables or duplicates, not plain records")
        values = offsets + _NODE + key
        if int((values + np.where(big, 8, length)).max()) > self.meta.page_size:
            raise self._damaged(f"page {number} points outside itself")
        if big.any():
            first = sum(_u16(page, values[big] + 2 * i) << 16 * i for i in range(4))
            last = first + (_HEADER.size + length[big] - 1) // self.meta.page_size
            if int(np.min(first)) < 2 or int(np.max(last)) > self.meta.last_page:
                raise self._damaged(f"page {number} refers to values outside the file")


def _u16(page: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """The little-endian 16-bit numbers at `offsets` (which need not be even)."""
    return page[offsets].astype(np.int64) | page[offsets + 1].astype(np.int64) << 8
