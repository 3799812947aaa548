"""A line on the terminal that is rewritten in place, and nothing of it where the output is a file or a pipe."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import TextIO

REFRESH_SECONDS = 0.1
PLAIN_SECONDS = 2.0
CLEAR = "\r\x1b[K"


class LiveLine:
    """Writes permanent lines, and on a terminal one line at the bottom that `show` replaces at most ten times a second."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream, self.clock = stream, clock
        self.live = stream.isatty()
        self._shown = False
        self._next = 0.0

    def due(self) -> bool:
        """Whether `show` would write now; ask first where making the text costs something."""
        return self.live and self.clock() >= self._next

    def show(self, text: str) -> None:
        """Replaces the live line by `text`, of which parts that are too much for the terminal's width are left out. Does nothing when it is not due."""
        if not self.due():
            return
        self._next = self.clock() + REFRESH_SECONDS
        self.stream.write(CLEAR + fitted(text, shutil.get_terminal_size().columns - 1))
        self.stream.flush()
        self._shown = True

    def print(self, text: str) -> None:
        """Writes a permanent line above the live one."""
        self.clear()
        self.stream.write(text + "\n")
        self.stream.flush()

    def clear(self) -> None:
        """Takes the live line away."""
        if self._shown:
            self.stream.write(CLEAR)
            self.stream.flush()
        self._shown = False
        self._next = 0.0


def fitted(text: str, width: int) -> str:
    """A line of parts with two blanks between them, without those that do not fit; of the first one, as much as fits."""
    first, *rest = text.split("  ")
    line = first[:width]
    for part in rest:
        if len(line) + 2 + len(part) <= width:
            line += f"  {part}"
    return line


class CountLine:
    """Progress through a known number of things: share, count, rate, time left. Call it with (done, total).

    On a terminal a live line; elsewhere a plain line at each tenth of the work, two seconds apart at least.
    """

    def __init__(self, stream: TextIO, what: str, unit: str = "images", clock: Callable[[], float] = time.monotonic) -> None:
        self.line, self.what, self.unit = LiveLine(stream, clock), what, unit
        self._start = self._printed = clock()
        self._tenth = 0

    def __call__(self, done: int, total: int) -> None:
        now = self.line.clock()
        tenth = 10 * done // max(total, 1)
        if self.line.due():
            self.line.show(self._text(done, total, now))
        elif not self.line.live and tenth > self._tenth and now >= self._printed + PLAIN_SECONDS:
            self.line.print(self._text(done, total, now))
            self._printed, self._tenth = now, tenth

    def _text(self, done: int, total: int, now: float) -> str:
        rate = done / max(now - self._start, 1e-9)
        share = done / max(total, 1)
        return f"{self.what} {share:4.0%}  {done:,}/{total:,}  {rate:,.0f} {self.unit}/s  ETA {duration((total - done) / max(rate, 1e-9))}"

    def close(self) -> None:
        """Takes the live line away."""
        self.line.clear()


def duration(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss."""
    whole = round(max(seconds, 0.0))
    minutes, hours = whole // 60, whole // 3600
    return f"{hours}:{minutes % 60:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
