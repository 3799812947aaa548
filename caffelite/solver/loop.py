"""Solver: the training loop, with Caffe's order of events in every iteration."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from caffelite.backends.contract import Array, Backend
from caffelite.errors import SpecError, TrainingError
from caffelite.params import FlatState
from caffelite.schema import SolverSpec, pb
from caffelite.solver.config import check_solver
from caffelite.solver.debug import backward_with_debug, forward_with_debug
from caffelite.solver.iteration import MOST_UNREAD, Iteration
from caffelite.solver.listeners import DATA_LAYER, Listener, Output
from caffelite.solver.nets import SolverNets
from caffelite.solver.rates import RatePolicy
from caffelite.solver.restore import cursors_of_tests, make_state, new_history, restore
from caffelite.solver.rules import RULES
from caffelite.solver.scoring import outputs_of
from caffelite.solver.signals import DEFAULT_EFFECTS, SignalWatch
from caffelite.solver.snapshot import SnapshotStore
from caffelite.solver.state_files import write_state
from caffelite.solver.tracking import Best, LossWindow, UpdateNotes

LOOK_SECONDS = 0.5  # between two looks at a device that runs ahead, at the most


class Solver:
    """Trains the net of a solver definition.

    backend, precision, observe: as for Net. listeners: told of every event. effects: what signals do while solve() runs, as
    in {"SIGINT": "stop"} (see signals.DEFAULT_EFFECTS). Everything wrong with the definition is raised here.
    Attributes: `net`, `test_nets`, `iter` (updates done), `seed`, `history`, `best`.

    NumPy's warnings are off while it runs: what diverges ends in a TrainingError that names the layer.
    """

    def __init__(
        self,
        spec: SolverSpec,
        *,
        backend: Backend,
        precision: str = "float32",
        observe: bool = False,
        listeners: Sequence[Listener] = (),
        effects: Mapping[str, str] = DEFAULT_EFFECTS,
    ) -> None:
        check_solver(spec)
        self.spec, self.param, self.backend, self.precision = spec, spec.param, backend, precision
        self.observe = observe or spec.param.debug_info  # debug_info speaks of blobs that fusing would hide
        self.listeners, self.effects = list(listeners), effects
        self.iter = 0
        self.seed = int(self.param.random_seed) if self.param.random_seed >= 0 else int.from_bytes(os.urandom(4), "little")
        self._notes = UpdateNotes(lambda text: self.tell(text, "sgd_solver.cpp"), self.param.clip_gradients)
        self.rates = RatePolicy(self.param, lambda text: self._notes.add(self.iter, text))
        self.snapshots = SnapshotStore(self.param)
        self.best = Best(self.param.snapshot_best) if self.param.snapshot_best else None
        self._watch: SignalWatch | None = None
        self._stopping = False
        self.test_cursors: list[pb.DataCursor] | None = None  # from before the test that is under way
        self._iteration: Iteration | None = None
        self._starts: list[dict[str, int]] = []  # where the data stood before each iteration that has not been looked at
        self._start = self._unseen = 0  # iterations: the first of this call, the first whose loss is not known
        self._looked = -math.inf
        self._clock = time.perf_counter()
        self._window = LossWindow(self.param.average_loss)
        self._nets = self._build()
        self.net, self.test_nets, self.scorers = self._nets.train, self._nets.tests, self._nets.scorers
        self.history: list[FlatState] = new_history(self.net.arena, RULES[self.param.type].states)
        self._states: list[Array] = [state.flat for state in self.history]

    # --- set-up --------------------------------------------------------------------------------------------------------

    def _build(self) -> SolverNets:
        nets = SolverNets(self.spec, self.backend, precision=self.precision, observe=self.observe, seed=self.seed, tell=self.tell)
        try:
            if self.param.snapshot > 0 or self.best:
                self.snapshots.probe()
            nets.load(self.param.weights)
        except BaseException:
            nets.close()
            raise
        self.tell("Solver scaffolding done.", "solver.cpp")
        return nets

    def close(self) -> None:
        """Ends the data layers' threads and closes their files."""
        self._nets.close()

    # --- events --------------------------------------------------------------------------------------------------------

    def tell(self, text: str, source: str, severity: str = "I") -> None:
        """Passes a line in Caffe's words to the listeners."""
        for listener in self.listeners:
            listener.on_message(text, source, severity)

    def _event(self, name: str, *values: Any) -> None:
        for listener in self.listeners:
            getattr(listener, name)(*values)

    # --- training ------------------------------------------------------------------------------------------------------

    @np.errstate(all="ignore")
    def solve(self, resume: str | Path | None = None) -> bool:
        """Trains up to max_iter, from the state file `resume` if given; returns whether a signal stopped it before that.

        SpecError when there is nothing to train; SnapshotError when a snapshot cannot be read or written; TrainingError
        when the loss or a weight is no longer finite.
        """
        self._nets.check_trainable()
        if self.param.snapshot_after_train:
            self.snapshots.probe()
        with SignalWatch(self.effects) as self._watch:
            try:
                return self._solve(resume)
            finally:
                self._watch = None

    def _solve(self, resume: str | Path | None) -> bool:
        p = self.param
        if resume is not None:
            self.tell(f"Resuming from {resume}", "caffe.cpp")
            self.restore(resume)
        elif (p.snapshot or p.snapshot_after_train) and (other := self.snapshots.another_run()):
            self.tell(other, "solver.cpp", "W")
        for layer in self.net.data_layers:
            if note := layer.order_note():
                self.tell(note, DATA_LAYER, "W")
        self._event("on_start", self)
        self.tell("Starting Optimization", "caffe.cpp")
        self.tell(f"Solving {self.net.name}", "solver.cpp")
        self.tell(f"Learning Rate Policy: {p.lr_policy}", "solver.cpp")
        start = self.iter
        self.step(p.max_iter - self.iter)
        if p.snapshot_after_train and not (p.snapshot and self.iter % p.snapshot == 0):
            self.snapshot()
        if self._stopping:
            self.tell("Optimization stopped early.", "solver.cpp")
        else:
            self._closing_report(start)
            self.tell("Optimization Done.", "solver.cpp")
        self.tell("Optimization Done.", "caffe.cpp")
        self._event("on_end", self._stopping)
        return self._stopping

    def _closing_report(self, start: int) -> None:
        p = self.param
        if p.display and self.iter % p.display == 0:
            self._place_forward(0)
            self.net.forward()
            smoothed = self._window.add(self.net.loss(), self.iter - start)
            self._event("on_display", self.iter, smoothed, (), None, 0.0)
        if p.test_interval and self.iter % p.test_interval == 0:
            self.test_all()

    @np.errstate(all="ignore")
    def step(self, iterations: int) -> None:
        """Runs `iterations` iterations in Caffe's order; fewer when a signal stops it."""
        self._look()  # an exception may have ended the call before this one, with iterations on the device that nobody has looked at
        self._stopping = False
        self._window, self._clock, self._looked = LossWindow(self.param.average_loss), time.perf_counter(), -math.inf
        self._start = self._unseen = self.iter
        self._notes.start(self.iter)
        self._starts.clear()
        self._work.reset()
        stop = self.iter + iterations
        while self.iter < stop and not self._stopping:
            self._step()
        self._look()

    def _step(self) -> None:
        p, number = self.param, self.iter
        self.net.zero_grads()
        if p.test_interval and number % p.test_interval == 0 and (number > 0 or p.test_initialization):
            self.test_all()
            if self._stopping:
                return
        self._event("on_iteration_start", number)
        self._starts.append({layer.name: layer.source.position for layer in self.net.data_layers})
        rate, display = self.rates.rate(number), p.display > 0 and number % p.display == 0
        self._work.set_rate(rate, number)
        if split := self._must_split():
            self._passes(debug=display and p.debug_info)
        else:
            self._whole()
        if self._must_look(display):
            self._look()
        if display:
            self._display(self._window.smoothed, rate)
        if split:
            self._event("on_gradients", number)
            self._update()
            self._take_norms()
        self.iter += 1
        self._notes.tell(self.iter)
        for listener in self.listeners:
            listener.on_iteration(self.iter, self._window.smoothed)
        self._after_update()

    def _must_split(self) -> bool:
        """Whether somebody wants to see or change the gradients between the passes and the update."""
        watched = any(getattr(type(listener), "on_gradients", None) is not Listener.on_gradients for listener in self.listeners)
        return watched or self.observe or self.net.borrows

    def _whole(self) -> None:
        for part in range(self.param.iter_size):
            self._place_forward(part)
            self.net.feed()
            self._work.run(part)

    def _passes(self, *, debug: bool) -> None:
        for part in range(self.param.iter_size):
            self._place_forward(part)
            forward_with_debug(self.net, self.tell) if debug else self.net.forward()
            self._work.add_loss(part == 0, part == self.param.iter_size - 1)
            backward_with_debug(self.net, self.tell) if debug else self.net.backward()
        self.net.arena.settle_grads()

    # A backend that runs ahead is looked at now and then, so that it need not wait for us; the device itself stops updating at a bad loss.

    def _must_look(self, display: bool) -> bool:
        late = time.perf_counter() - self._looked > LOOK_SECONDS or len(self._starts) >= MOST_UNREAD
        return display or late or not self.backend.runs_ahead

    def _look(self) -> None:
        """Takes note of what the iterations since the last look came to. TrainingError, or DataError, placed at the first that went wrong."""
        for loss in self._work.take_losses():
            if not math.isfinite(loss):
                raise self._diverged(loss)
            self._window.add(loss, self._unseen - self._start)
            self._unseen += 1
            del self._starts[0]
        self._take_norms()
        self._notes.tell(self.iter)
        self._looked = time.perf_counter()

    def _take_norms(self) -> None:
        for norm in self._work.take_norms():
            self._notes.add_norm(norm)

    def _place_forward(self, part: int) -> None:
        self.net.context.forward_count = self.iter * self.param.iter_size + part

    def _display(self, smoothed: float, rate: float) -> None:
        now, outputs = time.perf_counter(), outputs_of(self.net)
        if self.backend.runs_ahead and any(math.isnan(value) for output in outputs for value in output.values):
            self.net.recheck()
        self._event("on_display", self.iter, smoothed, outputs, rate, now - self._clock)
        self._clock = now

    def _after_update(self) -> None:
        """Serves signals and the regular snapshot."""
        requests = self._watch.take() if self._watch else set()
        self._stopping |= "stop" in requests
        if "snapshot" in requests or (self.param.snapshot and self.iter % self.param.snapshot == 0):
            self.snapshot()

    # --- the update ----------------------------------------------------------------------------------------------------

    @property
    def _work(self) -> Iteration:
        if self._iteration is None:
            write_step = self.param.snapshot_diff or self.observe
            self._iteration = Iteration(self.net, self.param, self._states, write_step=write_step)
        return self._iteration

    @property
    def lr(self) -> float:
        """The rate of the next update; reading it can advance multistep, as in Caffe."""
        rate = self.rates.rate(self.iter)
        self._notes.tell_all()
        return rate

    def apply_update(self) -> None:
        """One update from the gradients in the net."""
        self._look()
        self._work.set_rate(self.lr, self.iter)
        self._notes.start(self.iter)
        self._update()
        self._take_norms()
        self.iter += 1
        self._notes.tell(self.iter)

    def _update(self) -> None:
        if self.net.borrows:
            raise SpecError("the train net uses another net's parameters and cannot train them", hint="share the other way round: other.share_with(solver.net)")
        self._work.update()

    def _diverged(self, loss: float) -> TrainingError:
        """Goes back to the iteration that has not been seen yet, whose weights are still there, and says what is wrong with it."""
        self.iter = self._unseen
        self._work.reset()
        positions = self._starts[0]
        self._starts.clear()
        self._seek(positions)
        try:
            first = self._first_nonfinite() or "no layer shows it when the pass is repeated"
        finally:
            self._seek(positions)
        return TrainingError(f"the loss is {loss:g} in iteration {self.iter}: {first}", hint=self._advice())

    def _seek(self, positions: Mapping[str, int]) -> None:
        for layer in self.net.data_layers:
            layer.source.seek(positions[layer.name])

    def _first_nonfinite(self) -> str | None:
        for part in range(self.param.iter_size):
            self._place_forward(part)
            if found := self.net.first_nonfinite():
                return found
        return None

    def _advice(self) -> str:
        last = self.snapshots.last
        saved = f"the last good snapshot is {last}" if last else "no snapshot was written before"
        return f"{saved}; try a lower base_lr, clip_gradients, or other fillers"

    # --- testing -------------------------------------------------------------------------------------------------------

    @np.errstate(all="ignore")
    def test_all(self) -> None:
        """Scores every test net with the weights as they are."""
        self._look()
        self.test_cursors = cursors_of_tests(self)
        try:
            for index in range(len(self.test_nets)):
                if not self._stopping:
                    self._test(index)
        finally:
            self.test_cursors = None

    def _test(self, index: int) -> None:
        self.tell(f"Iteration {self.iter}, Testing net (#{index})", "solver.cpp")
        self._event("on_test_start", self.iter, index)
        scores = self.scorers[index].run(lambda done, total: self._may_test(index, done, total))
        if scores is None:
            self.tell("Test interrupted.", "solver.cpp")
            return
        loss = scores.loss if self.param.test_compute_loss else None
        self._event("on_test", self.iter, index, scores.outputs, loss, scores.records)
        if self.best:
            self._keep_best(self.best, index, scores.outputs)

    def _may_test(self, index: int, done: int, total: int) -> bool:
        self._event("on_test_batch", index, done, total)
        requests = self._watch.take() if self._watch else set()
        if "snapshot" in requests:
            self.snapshot()
        self._stopping |= "stop" in requests
        return not self._stopping

    def _keep_best(self, best: Best, index: int, outputs: Sequence[Output]) -> None:
        first = next(i for i, net in enumerate(self.test_nets) if best.output in net.outputs)
        value = next((output.values[0] for output in outputs if output.blob == best.output), math.nan)
        if index != first or not best.beaten_by(value):
            return
        self._require_finite()
        best.value, best.iteration = value, self.iter
        model, state = self.snapshots.pair("best")
        self._write(model, state)
        self._event("on_best", self.iter, best.output, value, Path(model))

    # --- snapshots -----------------------------------------------------------------------------------------------------

    def snapshot(self) -> Path:
        """Writes the model and then the state, each whole or not at all; returns the state's path.

        SnapshotError when they cannot be written; TrainingError, and nothing written, when a weight is not finite.
        """
        self._require_finite()
        model, state = self.snapshots.pair(self.iter)
        self._write(model, state)
        self.snapshots.wrote(self.iter, Path(state))
        self._event("on_snapshot", Path(model), Path(state))
        return Path(state)

    def _write(self, model: str, state: str) -> None:
        kind = "HDF5" if self.snapshots.suffix else "binary proto"
        self.tell(f"Snapshotting to {kind} file {model}", "solver.cpp")
        self.net.save(model, self.param.snapshot_diff)
        self.tell(f"Snapshotting solver state to {kind} file {state}", "sgd_solver.cpp")
        write_state(Path(state), make_state(self, model))

    def _require_finite(self) -> None:
        self._look()
        if self.backend.all_finite(self.net.arena.master):
            return
        bad = next(label for param, label in zip(self.net.arena.params, self.net.arena.labels) if not self.backend.all_finite(param.master))
        layer, _, index = bad.rpartition("/")
        raise TrainingError(f"parameter {index} is not finite after iteration {self.iter}; nothing is saved", layer=layer, hint=self._advice())

    def restore(self, path: str | Path) -> None:
        """Takes up the run saved in a .solverstate (or .solverstate.h5) file. SnapshotError when it does not fit this solver.

        A state written by Caffe lacks the seed and the data position: these stay as they are.
        """
        restore(self, Path(path))
        self._iteration = None  # a record of it holds the seed
        self.tell("SGDSolver: restoring history", "sgd_solver.cpp")
