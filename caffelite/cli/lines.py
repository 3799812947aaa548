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
