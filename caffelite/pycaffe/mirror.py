"""Arrays of a GPU shown as numpy.ndarrays that can be read and written between calls, as `.data` and `.diff` are.

Each has a mirror in the host's memory. Before the engine runs, what a program has written into mirrors goes to the GPU; after it has run, a
mirror is brought up to date when it is next asked for. On CPUs a blob's own array is shown, and nothing here has anything to do.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from caffelite.backends.contract import Array, Backend

_MIRRORS: weakref.WeakValueDictionary[int, Mirror] = weakref.WeakValueDictionary()  # by the array's id: nets that share one show one mirror


class Mirror:
    """The numpy.ndarray that stands for `array`."""

    def __init__(self, backend: Backend, array: Array) -> None:
        self.array, self._backend = array, backend
        self._host = np.empty(array.shape, np.float32)
        self._sent = self._host  # what both sides had when they last were equal
        self._current = False

    def show(self) -> np.ndarray:
        """The values, which may be written. The same numpy.ndarray every time."""
        if not self._current:
            self._host[...] = self._backend.to_host(self.array)
            self._sent, self._current = self._host.copy(), True
        return self._host

    def send(self) -> None:
        """Brings what was written here to the GPU: the elements that have changed, also where the others are out of date."""
        changed = _bits(self._host) != _bits(self._sent)
        if not changed.any():
            return
        if not self._current:
            written = self._host.copy()
            self._host[...] = self._backend.to_host(self.array)
            self._host[changed] = written[changed]
        self._backend.from_host(self._host, self.array)
        self._sent, self._current = self._host.copy(), True

    def forget(self) -> None:
        """The engine has run: the GPU may hold other values."""
        self._current = False


def _bits(values: np.ndarray) -> np.ndarray:
    """So that a NaN equals itself, and 0 is not -0."""
    return values.view(np.uint32)


def shown(mirrors: dict[str, Mirror], name: str, backend: Backend, array: Array) -> np.ndarray:
    """`array` as a numpy.ndarray; `mirrors` keeps the mirror alive under `name`."""
    if isinstance(array, np.ndarray):
        return array
    mirror = mirrors[name] = _MIRRORS.get(id(array)) or Mirror(backend, array)
    _MIRRORS[id(array)] = mirror
    return mirror.show()


@contextmanager
def engine_runs() -> Iterator[None]:
    """Within it the engine works with what programs have written."""
    _send()
    try:
        yield
    finally:
        _forget()


def called_back(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function for the engine to call while it runs, which may read and write arrays."""

    def run(*args: Any) -> Any:
        _forget()
        try:
            return function(*args)
        finally:
            _send()

    return run


def _send() -> None:
    for mirror in list(_MIRRORS.values()):
        mirror.send()


def _forget() -> None:
    for mirror in list(_MIRRORS.values()):
        mirror.forget()
