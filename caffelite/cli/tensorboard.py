"""train --tensorboard DIR: the curves of a run as TensorBoard reads them. Needs tensorboardX, the extra `tensorboard`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffelite.errors import CaffeliteError
from caffelite.solver.listeners import Listener, Output

if TYPE_CHECKING:
    from caffelite.solver.loop import Solver


class TensorBoardWriter(Listener):
    """Writes scalars: train/loss (smoothed), train/lr, and each output of one value as train/BLOB and test/BLOB (testN/BLOB for test net N).

    A resumed run goes on in the same folder; TensorBoard then leaves out what the earlier one had shown beyond the restored iteration.
    CaffeliteError when tensorboardX is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise CaffeliteError(
                "--tensorboard needs tensorboardX, which is not installed", hint="in a clone of caffelite: pip install '.[tensorboard]'"
            ) from error
        self._open: Any = SummaryWriter
        self._folder = folder
        self._writer: Any = None

    def on_start(self, solver: Solver) -> None:
        self._writer = self._open(str(self._folder), purge_step=solver.iter or None)

    def on_display(self, iteration: int, smoothed_loss: float, outputs: Sequence[Output], lr: float | None, seconds: float) -> None:
        self._writer.add_scalar("train/loss", smoothed_loss, iteration)
        if lr is not None:
            self._writer.add_scalar("train/lr", lr, iteration)
        self._outputs("train", iteration, [output for output in outputs if output.blob != "loss"])

    def on_test(self, iteration: int, net_index: int, outputs: Sequence[Output], loss: float | None, records: int) -> None:
        self._outputs(f"test{net_index or ''}", iteration, outputs)

    def _outputs(self, which: str, iteration: int, outputs: Sequence[Output]) -> None:
        for output in outputs:
            if len(output.values) == 1:
                self._writer.add_scalar(f"{which}/{output.blob}", output.values[0], iteration)

    def close(self) -> None:
        """Writes what is left and ends the files."""
        if self._writer is not None:
            self._writer.close()
