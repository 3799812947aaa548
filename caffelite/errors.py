"""Every error a user can cause, with its place: file, layer and blob; what was expected, what was found, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Where:
    """A place in a file; line and column count from 1 and are None when only the file is known."""

    file: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        return ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that a mistyped one is most like, whatever the case of letters, or None."""
    folded = {each.lower(): each for each in known}
    near = difflib.get_close_matches(word.lower(), folded, n=1, cutoff=0.6)
    return folded[near[0]] if near else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint for a word that is not among the known ones."""
    near, listed = nearest(word, known := list(known)), f"known ones: {', '.join(known)}"
    return f"did you mean '{near}'? {listed}" if near else listed


class CaffeliteError(Exception):
    """Base of all errors that are shown to a user without a traceback.

    `message` says what was expected and what was found; `hint` says what to do. The text reads
    "FILE:LINE:COLUMN: layer 'NAME': blob 'NAME': MESSAGE" with the hint on a line of its own.
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        where: Where | None = None,
        layer: str | None = None,
        blob: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.message, self.where, self.layer, self.blob, self.hint = message, where, layer, blob, hint
        super().__init__(message)

    def __str__(self) -> str:
        parts = [str(self.where)] if self.where else []
        parts += [f"layer '{self.layer}'"] if self.layer else []
        parts += [f"blob '{self.blob}'"] if self.blob else []
        text = ": ".join([*parts, self.message])
        return f"{text}\n  {self.hint}" if self.hint else text


class SpecError(CaffeliteError):
    """A prototxt or a command line asks for something that does not exist or cannot work (exit 2)."""

    exit_code = 2


class DataError(CaffeliteError):
    """A database, an image or a record is missing, damaged or does not fit the net."""


class LabelError(DataError):
    """A label names no class. position: its place in the batch, counted over all axes of the label."""

    def __init__(self, message: str, *, position: int, hint: str) -> None:
        self.position = position
        super().__init__(message, hint=hint)


class SnapshotError(CaffeliteError):
    """A .caffemodel, .solverstate or .binaryproto is missing, damaged, does not fit, or cannot be written."""


class BackendError(CaffeliteError):
    """A machine, library or precision that was asked for is not available, or failed."""


class OutOfMemoryError(BackendError):
    """A device has not as much memory as is needed. wanted: bytes that could not be had; free and total: the device's; used: those of this run."""

    def __init__(self, device: str, *, wanted: int, free: int, total: int, used: int) -> None:
        self.device, self.wanted, self.free, self.total, self.used = device, wanted, free, total, used
        mb = [f"{count / 2**20:,.0f}" for count in (wanted, free, total)]
        super().__init__(
            f"out of memory on {device}: {mb[0]} MB more are needed, {mb[1]} of {mb[2]} MB are free",
            hint="lower batch_size, or train with --precision bfloat16",
        )


class TrainingError(CaffeliteError):
    """Training cannot go on: the loss is not finite, for example."""
