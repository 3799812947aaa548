"""What a run keeps count of: the smoothed loss and the best test result."""

from __future__ import annotations

import math
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
