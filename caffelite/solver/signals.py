"""Signals during training: what SIGINT, SIGTERM and SIGHUP do, and taking them over only while a run lasts."""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any

from caffelite.errors import SpecError

EFFECTS = ("stop", "snapshot", "none")
DEFAULT_EFFECTS = {"SIGINT": "stop", "SIGTERM": "stop", "SIGHUP": "snapshot"}


class SignalWatch:
    """A context in which signals become requests: {"SIGINT": "stop", "SIGHUP": "snapshot", ...}.

    A second signal that stops raises KeyboardInterrupt at once. Outside the main thread Python allows no handlers, so
    nothing is watched there. SpecError for an unknown effect.
    """

    def __init__(self, effects: Mapping[str, str]) -> None:
        for name, effect in effects.items():
            if effect not in EFFECTS:
                raise SpecError(f"the effect of {name} is '{effect}'", hint=f"choose one of {', '.join(EFFECTS)}")
        self._effects = {int(number): effect for name, effect in effects.items() if (number := getattr(signal, name, None)) is not None}
        self._before: dict[int, Any] = {}
        self._stops = 0
        self._pending: set[str] = set()

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():
            for number in self._effects:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._before:
            number, handler = self._before.popitem()
            # None: the handler was not set from Python and cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        effect = self._effects[number]
        if effect == "stop":
            self._stops += 1
            if self._stops > 1:
                raise KeyboardInterrupt
        if effect != "none":
            self._pending.add(effect)

    def take(self) -> set[str]:
        """The requests ("snapshot", "stop") since the last call."""
        taken, self._pending = self._pending, set()
        return taken
