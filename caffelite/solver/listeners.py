"""Listener: what a program that watches a training run is told. Every method does nothing here; override what you need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from caffelite.solver.loop import Solver

DATA_LAYER = "data_layer.cpp"  # the source of what data layers have to say


class Output(NamedTuple):
    """A net output: the blob's name, its values in C order, and its loss weight (0 for one that is no loss)."""

    blob: str
    values: tuple[float, ...]
    weight: float


class Listener:
    """Told of a run's events, in the order in which they happen. All values are plain numbers and strings.

    An exception from a listener ends the run like any other error.
    """

    def on_start(self, solver: Solver) -> None:
        """solve() begins: the nets are built and, when resuming, the state is restored (`solver.iter` is where it goes on)."""

    def on_message(self, text: str, source: str, severity: str = "I") -> None:
        """A line in Caffe's words: `source` is the file that its prefix names ("solver.cpp"), `severity` one of I, W, E."""

    def on_iteration_start(self, iteration: int) -> None:
        """`iteration` updates are done and the next one begins: gradients are cleared, tests that were due are over."""

    def on_gradients(self, iteration: int) -> None:
        """The gradients of the update after `iteration` are complete. They, in `solver.net`, may still be changed."""

    def on_iteration(self, iteration: int, loss: float) -> None:
        """An update was applied, or on a GPU asked for; `iteration` updates are done. loss: smoothed over average_loss, from before the update;
        on a GPU from before the last one that has been looked at, at most half a second ago (the displayed loss is always the newest)."""

    def on_display(self, iteration: int, smoothed_loss: float, outputs: Sequence[Output], lr: float | None, seconds: float) -> None:
        """Every `display` iterations, after forward and backward and before the update of `iteration`.

        outputs: of the last sub-batch. seconds: since the last display, or since stepping began. The closing report
        of solve() has no outputs and lr None: it is a forward pass only.
        """

    def on_test_start(self, iteration: int, net_index: int) -> None:
        """Test net `net_index` starts to be scored with the weights after `iteration` updates."""

    def on_test_batch(self, net_index: int, done: int, total: int) -> None:
        """`done` of `total` batches of this test are scored."""

    def on_test(self, iteration: int, net_index: int, outputs: Sequence[Output], loss: float | None, records: int) -> None:
        """A test is complete. outputs: means over it; loss: mean total loss with test_compute_loss, else None; records: how many
        records were scored (0 when no data layer counts them)."""

    def on_snapshot(self, model: Path, state: Path) -> None:
        """A numbered snapshot is whole on disk."""

    def on_best(self, iteration: int, output: str, value: float, model: Path) -> None:
        """The test output named by snapshot_best is the best so far; its weights are on disk."""

    def on_end(self, stopped: bool) -> None:
        """solve() ends without an error; stopped: a signal asked for it before max_iter."""
