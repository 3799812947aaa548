"""Signals become requests only while they are watched; the second one that stops is immediate."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from caffelite.errors import SpecError
from caffelite.solver.signals import DEFAULT_EFFECTS, SignalWatch


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_default_effects() -> None:
    with SignalWatch(DEFAULT_EFFECTS) as watch:
        send(signal.SIGHUP)
        assert watch.take() == {"snapshot"}
        assert watch.take() == set()
        send(signal.SIGTERM)
        assert watch.take() == {"stop"}


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_second_stop_is_immediate_even_after_the_first_was_taken(second: int) -> None:
    with SignalWatch(DEFAULT_EFFECTS) as watch:
        send(signal.SIGINT)
        assert watch.take() == {"stop"}
        with pytest.raises(KeyboardInterrupt):
            send(second)


def test_effects_can_be_chosen() -> None:
    with SignalWatch({"SIGINT": "snapshot", "SIGHUP": "none"}) as watch:
        for _ in range(3):
            send(signal.SIGINT)
        send(signal.SIGHUP)
        assert watch.take() == {"snapshot"}


def test_handlers_are_put_back() -> None:
    def mine(number: int, frame: object) -> None:
        heard.append(number)

    heard: list[int] = []
    before = signal.signal(signal.SIGHUP, mine)
    try:
        with SignalWatch(DEFAULT_EFFECTS):
            send(signal.SIGHUP)
        assert heard == []
        send(signal.SIGHUP)
        assert heard == [signal.SIGHUP]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_watch_nothing() -> None:
    seen: list[object] = []

    def work() -> None:
        with SignalWatch(DEFAULT_EFFECTS):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_unknown_effect() -> None:
    with pytest.raises(SpecError, match="the effect of SIGINT is 'quit'\n  choose one of stop, snapshot, none"):
        SignalWatch({"SIGINT": "quit"})
