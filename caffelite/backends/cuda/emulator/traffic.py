"""Copies that a GPU makes in its own time, as late here as it might make them there: what relies on more fails.

An upload is made when somebody waits for it. Until then it is an error to use its destination; and it is an error to upload into memory
that something later than the event it waits for has used. Copies in the order of the ops are made at once. It is an error to change the
source of a copy before the host has waited for it, or for something that comes after it.
"""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np

from caffelite.errors import BackendError

Span = tuple[int, int]  # first address and number of bytes


@dataclass(eq=False)
class EmulatedEvent:
    """Implements caffelite.backends.cuda.driver.Event. moment: how much had been launched when it was recorded."""

    traffic: Traffic
    moment: int = 0
    upload: Upload | None = None  # whose end it is

    def synchronize(self) -> None:
        self.traffic.synchronize(self)


@dataclass(eq=False)
class Source:
    """Bytes of the host that are being copied, and what they were when that began."""

    values: Any
    before: bytes
    moment: int

    def check(self) -> None:
        """BackendError when they have changed."""
        if self.values.tobytes("A") != self.before:
            raise BackendError("page-locked memory was changed before a copy out of it was waited for")


@dataclass(eq=False)
class Upload:
    """A copy that has been asked for and not been made."""

    source: Source
    to: Span


class Traffic:
    """The order of things on one emulated device."""

    def __init__(self) -> None:
        self._moment = 0
        self._uploads: list[Upload] = []
        self._sources: list[Source] = []
        self._used: dict[Span, int] = {}  # destinations of uploads: the moment of their latest use
        self._pinned: list[weakref.ref[Any]] = []

    def pinned(self, nbytes: int) -> Any:
        memory = np.zeros(nbytes, np.uint8)
        self._pinned = [held for held in self._pinned if held() is not None] + [weakref.ref(memory)]
        return memory

    def allocated(self, span: Span) -> None:
        """These bytes are new: what is known of others that lay there goes."""
        self._used = {known: moment for known, moment in self._used.items() if not _meet(known, span)}

    def touch(self, spans: list[Span]) -> None:
        """Something in the order of the ops uses these bytes. BackendError when an upload into them has not been waited for."""
        self._moment += 1
        for span in spans:
            if any(_meet(upload.to, span) for upload in self._uploads):
                raise BackendError("memory was used before the upload into it was waited for")
            for known in self._used:
                if _meet(known, span):
                    self._used[known] = self._moment

    def send(self, values: Any, to: Span) -> None:
        self.touch([to])
        ctypes.memmove(to[0], self._locked(values).ctypes.data, to[1])
        self._sources.append(Source(values, values.tobytes("A"), self._moment))

    def upload(self, values: Any, to: Span, after: EmulatedEvent, done: EmulatedEvent) -> None:
        if max((moment for known, moment in self._used.items() if _meet(known, to)), default=0) > after.moment:
            raise BackendError("an upload would overwrite what was used later than the event that it waits for")
        self._used = {known: moment for known, moment in self._used.items() if not _meet(known, to)} | {to: self._moment}
        done.upload = Upload(Source(self._locked(values), values.tobytes("A"), self._moment), to)
        self._uploads.append(done.upload)

    def record(self, event: EmulatedEvent) -> None:
        self._moment += 1
        event.moment, event.upload = self._moment, None

    def wait(self, event: EmulatedEvent) -> None:
        """Ops from now on come after the event: the uploads up to it are made, in their order."""
        while event.upload in self._uploads:
            upload = self._uploads.pop(0)
            upload.source.check()
            ctypes.memmove(upload.to[0], upload.source.before, upload.to[1])
            upload.source.moment = self._moment  # what ends after this comes after the upload
            self._sources.append(upload.source)

    def synchronize(self, event: EmulatedEvent) -> None:
        """The host has waited for the event."""
        self.wait(event)
        self._settle(event.moment)
        if event.upload and event.upload.source in self._sources:
            event.upload.source.check()
            self._sources.remove(event.upload.source)

    def finish(self) -> None:
        """Everything in the order of the ops happens."""
        self._settle(self._moment)

    def _settle(self, moment: int) -> None:
        for source in self._sources:
            if source.moment <= moment:
                source.check()
        self._sources = [source for source in self._sources if source.moment > moment]

    def _locked(self, values: Any) -> Any:
        """The values. BackendError unless they lie in page-locked memory."""
        held = [memory for memory in (reference() for reference in self._pinned) if memory is not None]
        if not any(_within((values.ctypes.data, values.nbytes), (memory.ctypes.data, memory.nbytes)) for memory in held):
            raise BackendError("a copy that nobody waits for needs page-locked memory")
        return values


def _meet(one: Span, other: Span) -> bool:
    return one[0] < other[0] + other[1] and other[0] < one[0] + one[1]


def _within(part: Span, whole: Span) -> bool:
    return whole[0] <= part[0] and part[0] + part[1] <= whole[0] + whole[1]
