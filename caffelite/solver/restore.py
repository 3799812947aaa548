"""Between a Solver and its SolverState: what is saved of a run, and taking it up again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from caffelite.errors import SnapshotError, Where
from caffelite.net import Net
from caffelite.params import FlatState, ParamArena
from caffelite.schema import array_to_blob, blob_fits, blob_to_array, pb
from caffelite.solver.snapshot import model_of
from caffelite.solver.state_files import read_state

if TYPE_CHECKING:
    from caffelite.solver.loop import Solver


def make_state(solver: Solver, learned_net: str) -> pb.SolverState:
    """The state that belongs to the model file `learned_net`: Caffe's fields, and `run` for an exact resume."""
    state = pb.SolverState(iter=solver.iter, learned_net=learned_net, current_step=solver.rates.current_step, run=run_state(solver))
    for history in solver.history:
        for part in history.parts:
            array_to_blob(solver.net.backend.to_host(part), state.history.add())
    return state


def restore(solver: Solver, path: Path) -> None:
    """Takes up the run saved in `path`. SnapshotError when the state, or the model it names, does not fit; checked before changes."""
    state = read_state(path)
    arrays = _fitted_history(state, solver.net.arena, len(solver.history), path)
    model = model_of(state, path) if state.learned_net else None
    if model is not None:
        solver.net.copy_from(model)
    flat = [part for history in solver.history for part in history.parts]
    for values, part in zip(arrays, flat):
        solver.net.backend.from_host(values, part)
    solver.iter, solver.rates.current_step = state.iter, state.current_step
    if state.HasField("run"):
        _take_run_state(solver, state.run)
    solver.snapshots.resumed(path, state.iter)


def _fitted_history(state: pb.SolverState, arena: ParamArena, states: int, path: Path) -> list[np.ndarray]:
    params, where = arena.params, Where(str(path))
    if len(state.history) != states * len(params):
        raise SnapshotError(
            f"the state has {len(state.history)} history blob(s), this solver needs {states * len(params)} ({states} for each of {len(params)} parameters)",
            where=where,
            hint="it was saved by a solver of another type or with another net; use its .caffemodel with --weights to start anew from there",
        )
    arrays = []
    for index, blob in enumerate(state.history):
        param, label = params[index % len(params)], arena.labels[index % len(params)]
        values = blob_to_array(blob)
        if not blob_fits(blob, param.shape):
            layer, _, number = label.rpartition("/")
            raise SnapshotError(
                f"history blob {index} belongs to parameter {number} and has shape {values.shape}, the net has {param.shape}",
                where=where,
                layer=layer,
                hint="the net has changed since; use the .caffemodel with --weights to start anew from there",
            )
        arrays.append(values.reshape(param.shape))
    return arrays


def new_history(arena: ParamArena, states: int) -> list[FlatState]:
    """Zeroed history arrays, one for each state of the update rule."""
    return [arena.state() for _ in range(states)]


# --- what Caffe does not record --------------------------------------------------------------------------------------


def run_state(solver: Solver) -> pb.RunState:
    """What an exact resume needs beside Caffe's own state: seed, data positions, the best test result."""
    tests = cursors_of_tests(solver) if solver.test_cursors is None else solver.test_cursors
    run = pb.RunState(seed=solver.seed, cursor=[*_cursors_of(solver.net, 0, pb.TRAIN), *tests])
    if solver.best and solver.best.value is not None:
        run.best_value, run.best_iter = solver.best.value, solver.best.iteration
    return run


def cursors_of_tests(solver: Solver) -> list[pb.DataCursor]:
    """Where the test nets stand that go on from where they stopped."""
    return [
        cursor for index, (net, scorer) in enumerate(zip(solver.test_nets, solver.scorers)) if not scorer.whole for cursor in _cursors_of(net, index, pb.TEST)
    ]


def _cursors_of(net: Net, index: int, phase: int) -> list[pb.DataCursor]:
    return [
        pb.DataCursor(layer=layer.name, position=layer.source.position, phase=phase, net=index)  # type: ignore[arg-type]
        for layer in net.data_layers
    ]


def _take_run_state(solver: Solver, run: pb.RunState) -> None:
    if run.HasField("seed"):
        solver.seed = int(run.seed)
        for net in (solver.net, *solver.test_nets):
            net.context.seed = solver.seed
    for cursor in run.cursor:
        nets = [solver.net] if cursor.phase == pb.TRAIN else solver.test_nets[cursor.net : cursor.net + 1]
        for layer in (layer for net in nets for layer in net.data_layers if layer.name == cursor.layer):
            layer.source.seek(cursor.position)
    if solver.best and run.HasField("best_value"):
        solver.best.value, solver.best.iteration = run.best_value, run.best_iter
