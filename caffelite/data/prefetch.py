"""A thread that prepares batches ahead of their use."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class _State(Generic[T]):
    """What the thread and its owner share. The thread holds no reference to the owner, so a forgotten owner ends it."""

    def __init__(self, produce: Callable[[T], object], free: list[T]) -> None:
        self.produce = produce
        self.free, self.ready = deque(free), deque[T]()
        self.changed = threading.Condition()
        self.error: BaseException | None = None
        self.stopping = self.ended = False

    def work(self) -> None:
        """The thread: fills free slots in order until it is stopped or an error ends it."""
        try:
            while (slot := self._take()) is not None:
                self.produce(slot)
                with self.changed:
                    self.ready.append(slot)
                    self.changed.notify_all()
        except BaseException as error:  # crosses to the thread that asks for the batch
            self.error = error
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    def _take(self) -> T | None:
        with self.changed:
            self.changed.wait_for(lambda: self.stopping or self.free)
            return None if self.stopping else self.free.popleft()

    def stop(self, thread: threading.Thread) -> None:
        """Ends the thread and waits for it: at most the time of the batch in hand."""
        with self.changed:
            self.stopping = True
            self.changed.notify_all()
        if thread is not threading.current_thread():
            thread.join()


class Prefetcher(Generic[T]):
    """Calls produce(slot) in a thread for one free slot after another; get() gives filled slots in order, put_back() frees them.

    An exception in produce comes out of get(), after the slots filled before it. close() ends the thread;
    so do the collection of a forgotten Prefetcher and the end of the program.
    """

    def __init__(self, produce: Callable[[T], object], slots: list[T], name: str) -> None:
        self._state = _State(produce, slots)
        thread = threading.Thread(target=self._state.work, name=name, daemon=True)
        self._finalizer = weakref.finalize(self, self._state.stop, thread)
        thread.start()

    def get(self) -> T:
        """The next filled slot, waiting for it. Raises what ended the thread."""
        state = self._state
        with state.changed:
            state.changed.wait_for(lambda: state.ready or state.ended)
            if state.ready:
                return state.ready.popleft()
        raise state.error or RuntimeError("get() after close()")

    def ready(self) -> T | None:
        """The next slot if it is filled already."""
        with self._state.changed:
            return self._state.ready.popleft() if self._state.ready else None

    def put_back(self, slot: T) -> None:
        """Gives a slot from get() back."""
        with self._state.changed:
            self._state.free.append(slot)
            self._state.changed.notify_all()

    def close(self) -> None:
        """Ends the thread and waits for it."""
        self._finalizer()
