"""What a run keeps count of: the smoothed loss, the best test result, and what is to be said of updates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Best:
    """The best value so far of the test output that snapshot_best names."""

    output: str
    value: float | None = None
    iteration: int = 0

    def beaten_by(self, value: float) -> bool:
        """Whether `value` is better: lower for an output with "loss" in its name, else higher. NaN is never better."""
        if math.isnan(value):
            return False
        return self.value is None or (value < self.value if "loss" in self.output.lower() else value > self.value)


class LossWindow:
    """The loss smoothed over the last `size` iterations of one Step call."""

    def __init__(self, size: int) -> None:
        self._size, self.smoothed = size, 0.0
        self._losses: list[float] = []

    def add(self, loss: float, index: int) -> float:
        """The smoothed loss after iteration `index` of the call (from 0)."""
        if len(self._losses) < self._size:
            self._losses.append(loss)
            count = len(self._losses)
            self.smoothed = (self.smoothed * (count - 1) + loss) / count
        else:
            slot = index % self._size
            self.smoothed += (loss - self._losses[slot]) / self._size
            self._losses[slot] = loss
        return self.smoothed


class UpdateNotes:
    """What Caffe says of updates, each after what it says of its iteration's losses, in the order of the updates; `tell` says it.

    A norm may come to be known some iterations later (see solver/iteration.py): what follows it then waits for it.
    """

    def __init__(self, tell: Callable[[str], object], limit: float) -> None:
        self._tell, self._limit = tell, limit
        self._notes: list[tuple[int, str]] = []
        self._next_norm = 0  # the number of the update whose norm comes next

    def start(self, number: int) -> None:
        """The next update is number `number`; everything about those before is known."""
        self.tell_all()
        self._next_norm = number

    def add(self, number: int, text: str) -> None:
        """Something about update `number`."""
        self._notes.append((number, text))

    def add_norm(self, norm: float) -> None:
        """The gradient's norm in the next update whose norm was not known."""
        if norm > self._limit:
            text = f"Gradient clipping: scaling down gradients (L2 norm {norm:g} > {self._limit:g}) by scale factor {self._limit / norm:g}"
            self.add(self._next_norm, text)
        self._next_norm += 1

    def tell(self, end: int) -> None:
        """Says what there is about the updates before number `end`, up to the first whose norm is not known."""
        end = min(end, self._next_norm) if self._limit >= 0 else end
        self._notes.sort(key=lambda note: note[0])
        while self._notes and self._notes[0][0] < end:
            self._tell(self._notes.pop(0)[1])

    def tell_all(self) -> None:
        """Says everything."""
        for _, text in self._notes:
            self._tell(text)
        self._notes.clear()
