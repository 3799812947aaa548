"""metrics.jsonl: a run's figures for programs to read, one JSON object a line.

Every record has "event" and "iteration"; the events are start, train, test, snapshot, best and end. A resumed run goes on in the
same file, without the records of the iterations that are done again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffelite.cli.chance import chances
from caffelite.cli.common import json_text, peak_device_mb
from caffelite.cli.lines import LineFile, is_plain_file, set_aside
from caffelite.cli.progress import Pace, images_per_iteration
from caffelite.files import write_atomically
from caffelite.solver.listeners import Listener, Output

if TYPE_CHECKING:
    from caffelite.backends.contract import Backend
    from caffelite.solver.loop import Solver


class MetricsWriter(Listener):
    """Writes the metrics of a run to `path`. facts: what the start record says besides (solver file, precision, ...).

    A run from iteration 0 starts a new file; an older one of that name is kept as NAME.old.
    """

    def __init__(self, path: Path, facts: dict[str, Any], clock: Callable[[], float] = time.time) -> None:
        self.path, self.facts, self.clock = path, facts, clock
        self.chances: dict[str, float] = {}  # known once the run has started
        self._batch, self._pace = 1, Pace(clock)
        self._file: LineFile | None = None
        self._backend: Backend | None = None
        self._iteration = 0
        self._started = clock()

    def on_start(self, solver: Solver) -> None:
        self._iteration, self._batch, self._backend = solver.iter, images_per_iteration(solver), solver.backend
        if not solver.iter:
            set_aside(self.path)
        elif is_plain_file(self.path):
            write_atomically(self.path, lambda file: file.write(kept_records(self.path, solver.iter).encode()))
        self._file = LineFile(self.path, "metrics")
        self._started = self.clock()
        self.chances = chances(solver)
        first = next(iter(self.chances.values()), None)
        self._write("start", solver.iter, net=solver.net.name, max_iter=solver.param.max_iter, batch=self._batch, chance=first, **self.facts)
        self._pace.pause()

    def on_iteration(self, iteration: int, loss: float) -> None:
        self._iteration = iteration
        self._pace.iteration()

    def on_display(self, iteration: int, smoothed_loss: float, outputs: Sequence[Output], lr: float | None, seconds: float) -> None:
        rate = self._pace.lap()
        self._write("train", iteration, loss=smoothed_loss, lr=lr, images_per_s=rate and rate * self._batch, outputs=_named(outputs) or None)

    def on_test(self, iteration: int, net_index: int, outputs: Sequence[Output], loss: float | None, records: int) -> None:
        self._write("test", iteration, net=net_index, outputs=_named(outputs), loss=loss, records=records or None)
        self._pace.pause()

    def on_snapshot(self, model: Path, state: Path) -> None:
        self._write("snapshot", self._iteration, model=str(model), state=str(state))
        self._pace.pause()

    def on_best(self, iteration: int, output: str, value: float, model: Path) -> None:
        self._write("best", iteration, output=output, value=value, model=str(model))

    def on_end(self, stopped: bool) -> None:
        self._write("end", self._iteration, stopped=stopped, peak_device_mb=peak_device_mb(self._backend) if self._backend else None)
        self.close()

    def close(self) -> None:
        """Closes the file."""
        if self._file:
            self._file.close()

    def _write(self, event: str, iteration: int, **values: Any) -> None:
        seconds = round(self.clock() - self._started, 3)
        record = {"event": event, "iteration": iteration, "seconds": seconds, **{k: _short(v) for k, v in values.items() if v is not None}}
        if self._file:
            self._file.write(json_text(record))


def _short(value: Any) -> Any:
    """Numbers with the seven digits that float32 has."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    return [_short(item) for item in value] if isinstance(value, list) else value


def _named(outputs: Sequence[Output]) -> dict[str, Any]:
    """Blob name -> its value, or its values where it has several."""
    return {o.blob: o.values[0] if len(o.values) == 1 else list(o.values) for o in outputs}


def kept_records(path: Path, iteration: int) -> str:
    """The lines of a metrics file that a run restored at `iteration` will not write again."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "".join(line + "\n" for line in lines if _kept(line, iteration))


def _kept(line: str, iteration: int) -> bool:
    try:
        record = json.loads(line)
        # What happens at an iteration comes before its update, except the snapshot of the state after it.
        after = record["event"] in ("snapshot", "start")
        return bool(record["iteration"] <= (iteration if after else iteration - 1))
    except (ValueError, KeyError, TypeError):
        return False  # a line cut short by a kill
