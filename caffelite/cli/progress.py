"""The progress of a training run: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from caffelite.cli.live import LiveLine, duration
from caffelite.solver.listeners import DATA_LAYER, Listener, Output

if TYPE_CHECKING:
    from caffelite.solver.loop import Solver

MEMORY = 0.9  # the share of the past in the running mean of an iteration's time
SPAN = 0.2  # seconds that iterations take together before their mean counts: a device that runs ahead is waited for now and then only


def images_per_iteration(solver: Solver) -> int:
    """How many images one update is made from."""
    return solver.net.batch_size * max(solver.spec.param.iter_size, 1)


def loss_text(loss: float) -> str:
    """Four decimals, as tests show theirs, so that the line stays in place; four digits where these say little."""
    return f"{loss:.4f}" if 0.1 <= abs(loss) < 1e5 else f"{loss:.4g}"


class Pace:
    """How long iterations take, without the tests and snapshots between them. clock: seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.mean: float | None = None  # running mean of an iteration's seconds
        self.seconds, self.iterations = 0.0, 0  # since the last lap
        self._began = clock()
        self._span, self._count, self._settled = 0.0, 0, False

    def iteration(self) -> None:
        """An iteration ended."""
        now = self.clock()
        spent, self._began = now - self._began, now
        self.seconds, self.iterations = self.seconds + spent, self.iterations + 1
        if self.mean is None:
            self.mean = spent
            return
        self._span, self._count = self._span + spent, self._count + 1
        if self._span >= SPAN:
            share = MEMORY**self._count if self._settled else 0.0  # the very first one set things up that the others find ready
            self.mean = share * self.mean + (1 - share) * self._span / self._count
            self._span, self._count, self._settled = 0.0, 0, True

    def pause(self) -> None:
        """What went on since the last iteration was no training."""
        self._began = self.clock()

    def lap(self) -> float | None:
        """Iterations a second since the last lap, None for none; a new lap starts, in the middle of an iteration."""
        begun = self.clock() - self._began
        count, seconds = self.iterations, self.seconds + begun
        self.seconds, self.iterations = -begun, 0
        return count / seconds if count and seconds > 0 else None


class ProgressLine(Listener):
    """Shows iteration, loss, accuracy, images a second, the time left and the learning rate.

    On a terminal the line is live and tests and snapshots are lines above it; elsewhere each display is a line.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.line, self.pace = LiveLine(stream, clock), Pace(clock)
        self.scores: dict[str, float] = {}  # the last test's outputs that are no losses, by label
        self.best: tuple[str, float, int, Path] | None = None  # the output that snapshot_best names: its best value, when, the weights
        self.model: Path | None = None  # the last snapshot's weights
        self.state: Path | None = None  # and its state
        self.kept = -1  # and its iteration
        self.iteration, self.stopped = 0, False
        self._batch, self._max_iter = 1, 0
        self._lr: float | None = None
        self._testing = ""

    def on_start(self, solver: Solver) -> None:
        self._batch, self._max_iter = images_per_iteration(solver), solver.spec.param.max_iter
        self.iteration = solver.iter
        self.pace.pause()

    def on_iteration(self, iteration: int, loss: float) -> None:
        self.iteration = iteration
        self.pace.iteration()
        if self.line.due():
            self.line.show(self._text(iteration, loss))

    def on_display(self, iteration: int, smoothed_loss: float, outputs: Sequence[Output], lr: float | None, seconds: float) -> None:
        self._lr = lr if lr is not None else self._lr
        if not self.line.live:
            self.line.print(self._text(iteration, smoothed_loss))

    def on_test_start(self, iteration: int, net_index: int) -> None:
        self._testing = f"iteration {iteration:,}  testing" + (f" net {net_index}" if net_index else "")

    def on_test_batch(self, net_index: int, done: int, total: int) -> None:
        if self.line.due():
            self.line.show(f"{self._testing}  batch {done:,}/{total:,}")

    def on_test(self, iteration: int, net_index: int, outputs: Sequence[Output], loss: float | None, records: int) -> None:
        self.pace.pause()
        net = f" (net {net_index})" if net_index else ""
        values = [(o.blob, o.values[0], o.weight) for o in outputs if len(o.values) == 1]
        self.scores.update({blob + net: value for blob, value, weight in values if not weight})
        shown = ", ".join(f"{blob} {value:.4f}" for blob, value, _ in values)
        shown += f"{', ' if shown else ''}total loss {loss:.4f}" if loss is not None else ""
        self.line.print(f"iteration {iteration:,}: test{net} {shown}" + (f" over {records:,} records" if records else ""))

    def on_snapshot(self, model: Path, state: Path) -> None:
        self.pace.pause()
        self.model, self.state, self.kept = model, state, self.iteration
        self.line.print(f"snapshot: {model}")

    def on_best(self, iteration: int, output: str, value: float, model: Path) -> None:
        self.best = output, value, iteration, model
        self.line.print(f"best {output} so far ({value:.4f}): {model}")

    def on_message(self, text: str, source: str, severity: str = "I") -> None:
        if severity == "W":
            self.line.print(f"warning: {text}")
        elif source == DATA_LAYER or text.startswith("    ["):  # debug_info, which Caffe too writes on the terminal
            self.line.print(text)

    def on_end(self, stopped: bool) -> None:
        self.stopped = stopped
        self.line.clear()

    def close(self) -> None:
        """Takes the live line away."""
        self.line.clear()

    def _text(self, iteration: int, loss: float) -> str:
        parts = [f"iteration {iteration:,}/{self._max_iter:,}", f"loss {loss_text(loss)}"]
        parts += [f"{label} {value:.4f}" for label, value in list(self.scores.items())[:1]]
        mean = self.pace.mean
        parts += [f"{self._batch / mean:,.0f} images/s", f"ETA {duration((self._max_iter - iteration) * mean)}"] if mean else []
        # Last, as it is what a narrow terminal may cut off.
        parts += [f"lr {self._lr:.4g}"] if self._lr is not None else []
        return "  ".join(parts)
