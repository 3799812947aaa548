"""Files of lines that grow during a run: each line is flushed, and a full disk costs the file, not the run."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TextIO

from caffelite.errors import CaffeliteError

STANDARD_OUTPUT = Path("-")


class LineFile:
    """A text file opened for appending, or the standard output. CaffeliteError if it cannot be opened; later failures end the file with a warning.

    Where who reads the standard output has gone, BrokenPipeError ends the run, as it does for what a run says there itself.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what = path, what
        self._file: TextIO = sys.stdout
        if path == STANDARD_OUTPUT:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise CaffeliteError(f"cannot write {what} {path}: {error.strerror or error}", hint="choose another place for it") from error

    def write(self, line: str) -> None:
        """Appends one line."""
        if self._file.closed:
            return
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            if self.path == STANDARD_OUTPUT:
                raise
            print(f"caffelite: warning: {self.what} {self.path} ends here: {error.strerror or error}; the run goes on", file=sys.stderr)
            self.close()

    def close(self) -> None:
        """Closes the file."""
        if self._file is sys.stdout:
            return
        with contextlib.suppress(OSError):  # a full disk again: write has said so
            self._file.close()


def is_plain_file(path: Path) -> bool:
    """Whether there is an ordinary file of that name; the standard output is none, nor is /dev/stdout, which leads to one when redirected."""
    return path != STANDARD_OUTPUT and path.is_file() and not path.is_symlink()


def set_aside(path: Path) -> None:
    """Renames an existing file NAME to NAME.old, so that a new run does not mix with an old one."""
    if is_plain_file(path):
        try:
            path.replace(path.with_name(path.name + ".old"))
        except OSError as error:
            raise CaffeliteError(f"cannot rename {path}: {error.strerror or error}", hint="choose another place, or remove it") from error
