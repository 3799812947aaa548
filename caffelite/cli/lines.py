"""Files of lines that grow during a run: each line is flushed, and a full disk costs the file, not the run."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from caffelite.errors import CaffeliteError


class LineFile:
    """A text file opened for appending. CaffeliteError if it cannot be opened; later failures end the file with a warning."""

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what = path, what
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
            print(f"caffelite: warning: {self.what} {self.path} ends here: {error.strerror or error}; the run goes on", file=sys.stderr)
            self.close()

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):  # a full disk again: write has said so
            self._file.close()


def is_plain_file(path: Path) -> bool:
    """Whether there is an ordinary file of that name; /dev/stdout, which leads to one when redirected, is none."""
    return path.is_file() and not path.is_symlink()


def set_aside(path: Path) -> None:
    """Renames an existing file NAME to NAME.old, so that a new run does not mix with an old one."""
    if is_plain_file(path):
        try:
            path.replace(path.with_name(path.name + ".old"))
        except OSError as error:
            raise CaffeliteError(f"cannot rename {path}: {error.strerror or error}", hint="choose another place, or remove it") from error
