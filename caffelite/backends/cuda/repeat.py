"""Repeat: ops that are the same every time, recorded once and played back: on a GPU, a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from caffelite.backends.cuda.common import Base
from caffelite.backends.cuda.driver import Record


class Repeat:
    """See Backend.repeatable. The first call runs the ops as they are, so that programs are compiled and the memory that ops keep is made; the
    second records them, and every later one plays the record."""

    def __init__(self, ops: Base, run: Callable[[], None]) -> None:
        self._ops, self._run = ops, run
        self._warm = False
        self._record: Record | None = None
        self._held: list[Any] = []  # the arrays of the record, scratch memory included

    def __call__(self) -> None:
        if not self._warm:
            self._run()
            self._warm = True
            return
        if self._record is None:
            with self._ops.holding(self._held):
                self._record = self._ops.driver.capture(self._run)
        self._record.play()
