"""caffelite check: whether nets and solvers can be built, and whether the data, means and folders they name are there."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial

from caffelite.cli.common import Parser, add_state_flags, trace
from caffelite.cli.specs import gpu_of, gpu_place, is_solver
from caffelite.errors import CaffeliteError, SnapshotError
from caffelite.graph import build_graph, select_layers
from caffelite.hdf5 import h5py_module
from caffelite.layers.data import DataLayer
from caffelite.schema import NetSpec, SolverSpec, pb, read_net, read_solver
from caffelite.solver.config import NetChoice, check_best, check_solver, test_choices, train_choice
from caffelite.solver.nets import check_learns
from caffelite.solver.snapshot import SnapshotStore
from caffelite.weights import read_weights

PHASES = (pb.TRAIN, pb.TEST)


def build_parser(prog: str) -> Parser:
    parser = Parser(
        prog,
        "Checks net and solver files: that they can be built in both phases, that every source opens and its first record\n"
        "fits, that images are of one size where no crop_size makes them so, that mean files and weights can be read, that\n"
        "snapshots can be written. Exits with 0 if all is well, with 2 if a net or a solver is wrong, with 1 if it is what they\n"
        "name: databases, means, weights or folders.",
        f"{prog} solvers/*.prototxt models/*/*.prototxt",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="nets and solvers, as prototxt")
    add_state_flags(parser, phase=False)
    return parser


def run(args: argparse.Namespace) -> int:
    status = 0
    for file in args.files:
        try:
            lines, faults = check_solver_file(read_solver(file), args) if is_solver(file) else check_net_file(read_net(file), args)
        except CaffeliteError as error:
            trace(error)
            lines, faults = [], [error]
        status = max([status, *(fault.exit_code for fault in faults)])
        for fault in dict.fromkeys(map(str, faults)):  # both phases may have the same
            place = "" if fault.startswith(file) else f"{file}: "
            print(f"caffelite: error: {place}{fault}", file=sys.stderr)
        for line in lines:
            print(f"{file}: {line}")
        print(f"{file}: {'not ' if faults else ''}OK")
    return status


def faults_of(checks: Iterable[Callable[[], object]]) -> list[CaffeliteError]:
    """The errors of independent checks, in order."""
    faults: list[CaffeliteError] = []
    for check in checks:
        try:
            check()
        except CaffeliteError as error:  # noqa: PERF203 (each check fails on its own)
            trace(error)
            faults.append(error)
    return faults


def check_net_file(spec: NetSpec, args: argparse.Namespace) -> tuple[list[str], list[CaffeliteError]]:
    """What there is to say about a net, and what is wrong with it. Phases without a layer are left out."""
    choices = []
    for phase in PHASES:
        state = pb.NetState(phase=phase, level=args.level, stage=[*spec.param.state.stage, *args.stage])
        if select_layers(spec, state):
            choices.append(NetChoice(spec, spec.file, phase, args.level, tuple(args.stage)))
    choices = choices or [NetChoice(spec, spec.file, pb.TRAIN, args.level, tuple(args.stage))]  # whose error says that it is empty
    lines: list[str] = []
    return lines, faults_of(_net_check(choice, lines) for choice in choices)


def check_solver_file(spec: SolverSpec, args: argparse.Namespace) -> tuple[list[str], list[CaffeliteError]]:
    """The same for a solver and its nets."""
    check_solver(spec)
    spec.param.train_state.stage.extend(args.stage)
    if args.level:
        spec.param.train_state.level = args.level
    train = train_choice(spec)
    lines: list[str] = []
    if gpu_place(spec):
        lines.append(f"note: solver_mode: GPU: train runs it on GPU {gpu_of(spec)}, unless --backend or CAFFELITE_BACKEND names another backend")
    if spec.param.max_iter <= 0:
        lines.append("note: it has no max_iter; train it with --iterations")
    tests, outputs = test_choices(spec, train), set[str]()
    checks = [_net_check(train, lines, learns=True), *(_net_check(choice, lines, outputs) for choice in tests)]
    checks += [partial(_read_weights, path.strip()) for paths in spec.param.weights for path in paths.split(",")]
    if spec.param.snapshot > 0 or spec.param.snapshot_after_train:
        checks.append(lambda: check_prefix(spec))
    faults = faults_of(checks)
    return lines, faults or faults_of([lambda: check_best(spec, outputs)])  # the outputs are known of whole nets


def _read_weights(path: str) -> None:
    read_weights(path)


def _net_check(choice: NetChoice, lines: list[str], outputs: set[str] | None = None, *, learns: bool = False) -> Callable[[], None]:
    """A check that adds a line about the net to `lines`, and its outputs to `outputs`. learns: it has to have parameters that do."""

    def check() -> None:
        # Building asks each data layer for its item's shape, so it opens the database, reads a record and the mean file.
        graph = build_graph(choice.spec, phase=choice.phase, level=choice.level, stages=choice.stages)
        try:
            for layer in (node.layer for node in graph.nodes if isinstance(node.layer, DataLayer)):
                layer.source.check_sizes()
                if choice.phase == pb.TRAIN and (note := layer.order_note()):
                    lines.append(f"warning: {note}")
            if learns:
                check_learns(graph, choice.spec.where.at())
        finally:
            for node in graph.nodes:
                node.layer.close()
        sources = [node.layer.param.data_param.source for node in graph.nodes if node.layer.type == "Data"]
        data = f", reading {', '.join(sources)}" if sources else ""
        if outputs is not None:
            outputs.update(graph.outputs)
        lines.append(f"net '{graph.name}' in phase {pb.Phase.Name(graph.phase)}: {len(graph.nodes)} layers{data}")

    return check


def check_prefix(spec: SolverSpec) -> None:
    """SnapshotError unless snapshots could be written; makes nothing, as training makes the folder."""
    store = SnapshotStore(spec.param)
    if store.suffix:
        h5py_module()
    folder = store.folder.absolute()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise SnapshotError(
            f"snapshots cannot be written in {folder}: {nearest} is not a writable folder",
            where=spec.where.at("snapshot_prefix"),
            hint="change snapshot_prefix",
        )
