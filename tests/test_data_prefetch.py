"""The prefetch thread: order, bounded look-ahead, errors, endings."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from caffelite.data.prefetch import Prefetcher
from caffelite.errors import DataError


class Counter:
    """Fills slots with 0, 1, 2, ...; `reached` is set when number `mark` has begun."""

    def __init__(self, mark: int = -1, bad: int = -1) -> None:
        self.next, self.mark, self.bad = 0, mark, bad
        self.reached = threading.Event()

    def __call__(self, slot: list[int]) -> None:
        slot[0] = self.next
        if self.next == self.bad:
            raise DataError("bad record")
        self.next += 1
        if self.next == self.mark:
            self.reached.set()


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "under test"]


def test_slots_come_in_order_and_no_more_than_there_are() -> None:
    counter = Counter(mark=3)
    prefetcher = Prefetcher(counter, [[0], [0], [0]], "under test")
    assert counter.reached.wait(10)
    for expected in range(50):
        assert counter.next <= expected + 3
        slot = prefetcher.get()
        assert slot == [expected]
        prefetcher.put_back(slot)
    prefetcher.close()
    assert not threads()


def test_ready_does_not_wait() -> None:
    filled = threading.Semaphore(0)
    prefetcher = Prefetcher(lambda slot: filled.acquire(), [[0], [1]], "under test")
    assert prefetcher.ready() is None
    filled.release()
    assert prefetcher.get() == [0]
    assert prefetcher.ready() is None
    filled.release()
    with prefetcher._state.changed:
        assert prefetcher._state.changed.wait_for(lambda: prefetcher._state.ready, 10)
    assert prefetcher.ready() == [1]
    prefetcher.close()


def test_an_error_comes_out_after_the_slots_before_it() -> None:
    prefetcher = Prefetcher(Counter(bad=2), [[0], [0], [0]], "under test")
    assert [prefetcher.get(), prefetcher.get()] == [[0], [1]]
    for _ in range(2):
        with pytest.raises(DataError, match="bad record"):
            prefetcher.get()
    prefetcher.close()


def test_close_ends_a_waiting_thread_and_may_be_repeated() -> None:
    counter = Counter(mark=1)
    prefetcher = Prefetcher(counter, [[0]], "under test")
    assert counter.reached.wait(10)
    prefetcher.close()
    prefetcher.close()
    assert not threads()


def test_a_forgotten_prefetcher_ends_its_thread() -> None:
    prefetcher = Prefetcher(Counter(), [[0]], "under test")
    del prefetcher
    gc.collect()
    assert not threads()


def test_a_program_that_forgets_to_close_ends_in_peace() -> None:
    code = "from caffelite.data.prefetch import Prefetcher; p = Prefetcher(print, [1, 2], 'x'); p.get()"
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1])
    assert (run.returncode, run.stderr) == (0, "")
