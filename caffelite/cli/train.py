"""caffelite train: trains a net from its solver file, with progress, metrics and a log."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TextIO

from caffelite import __version__
from caffelite.cli.caffe_log import CaffeLog
from caffelite.cli.common import Parser, add_machine_flags, add_state_flags, comma_list, driver_of, megabytes, named_file, one_of, open_backend, whole_number
from caffelite.cli.lines import STANDARD_OUTPUT
from caffelite.cli.live import duration
from caffelite.cli.metrics import MetricsWriter
from caffelite.cli.out_of_memory import explained, nets_of, with_snapshot
from caffelite.cli.progress import ProgressLine
from caffelite.cli.specs import gpu_of, gpu_place, load_solver
from caffelite.cli.tensorboard import TensorBoardWriter
from caffelite.errors import OutOfMemoryError, SpecError
from caffelite.schema import SolverSpec
from caffelite.solver.listeners import Listener
from caffelite.solver.loop import Solver
from caffelite.solver.signals import EFFECTS
from caffelite.solver.snapshot import find_newest, states_of


def build_parser(prog: str) -> Parser:
    parser = Parser(
        prog,
        "Trains a net from its solver file. Metrics are written beside the snapshots, as <snapshot_prefix>_metrics.jsonl.\n"
        "Ctrl-C stops after the iteration with a snapshot; a second one stops at once. The log or the metrics may go to the standard\n"
        "output, written -; progress then goes to the standard error stream.",
        f"{prog} --solver solvers/nin.prototxt --snapshot auto --log nin.log",
    )
    parser.add_argument("--solver", required=True, metavar="FILE", help="the solver (prototxt)")
    start = parser.add_argument_group("start")
    start.add_argument("--weights", type=comma_list, metavar="FILES", help="start from these .caffemodel files (several with commas), by layer name")
    start.add_argument(
        "--snapshot", metavar="FILE", help="go on from a .solverstate; auto: from the whole one of the highest iteration, or anew if there is none"
    )
    start.add_argument("--iterations", type=whole_number(1), metavar="N", help="train until this iteration instead of the solver's max_iter")
    parser.add_argument(
        "--log", metavar="FILE", help="also write a log in Caffe's line shapes; a resumed run goes on in it, a new one keeps an older log as FILE.old"
    )
    parser.add_argument("--metrics", metavar="FILE", help="where to write the metrics instead of beside the snapshots")
    parser.add_argument(
        "--tensorboard", type=named_file, metavar="DIR", help="also write the curves for TensorBoard into this folder (needs the extra tensorboard)"
    )
    effect = one_of(*EFFECTS)
    parser.add_argument("--sigint-effect", type=effect, default="stop", metavar="E", help="on SIGINT or SIGTERM: stop (default), snapshot or none")
    parser.add_argument("--sighup-effect", type=effect, default="snapshot", metavar="E", help="on SIGHUP: stop, snapshot (default) or none")
    add_state_flags(parser, phase=False, whose="the training net's", others="; test nets take the solver's test_state")
    add_machine_flags(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    spec = load_solver(args.solver)
    apply_flags(spec, args)
    screen = screen_for(args)
    backend = open_backend(args, gpu_mode=gpu_place(spec), device=gpu_of(spec))
    resume = find_state(spec, args.snapshot, screen)
    if resume:
        del spec.param.weights[:]  # found by "auto"
    metrics_path = Path(args.metrics or f"{spec.param.snapshot_prefix}_metrics.jsonl")
    facts = {"solver": args.solver, "backend": backend.name, "precision": args.precision, "version": __version__}
    facts |= {"driver": driver} if (driver := driver_of(backend)) else {}
    facts |= {"resumed_from": str(resume)} if resume else {}
    progress, metrics = ProgressLine(screen), MetricsWriter(metrics_path, facts)
    log = [CaffeLog(Path(args.log), append=resume is not None)] if args.log else []
    board = [TensorBoardWriter(Path(args.tensorboard))] if args.tensorboard else []
    for file in log:
        file.line(f"Using GPUs {args.gpu or gpu_of(spec)}" if backend.name == "cuda" else "Use CPU.", "caffe.cpp")
    listeners: list[Listener] = [progress, metrics, *log, *board]
    effects = {"SIGINT": args.sigint_effect, "SIGTERM": args.sigint_effect, "SIGHUP": args.sighup_effect}
    started = time.monotonic()
    try:
        with explained(lambda: nets_of(spec), args.precision, spec.param):
            solver = Solver(spec, backend=backend, precision=args.precision, listeners=listeners, effects=effects)
            try:
                solver.solve(resume=resume)
            finally:
                solver.close()
    except OutOfMemoryError as error:
        with_snapshot(error, progress.state)
        raise
    finally:
        progress.close()
        metrics.close()
        for file in log:
            file.close()
        for curves in board:
            curves.close()
    for line in closing_lines(progress, metrics.chances, time.monotonic() - started):
        print(line, file=screen)
    if metrics_path != STANDARD_OUTPUT:
        print(f"  metrics   {metrics_path} (curves: caffelite plot {metrics_path})", file=screen)
    if (peak := backend.peak_bytes()) is not None:
        print(f"  memory    {megabytes(peak)} of the GPU's at the peak (caffelite summary --backend cuda foretells it)", file=screen)
    if args.log and Path(args.log) != STANDARD_OUTPUT:
        print(f"  log       {args.log}", file=screen)
    if progress.stopped:
        print(f"  {how_to_go_on(progress, spec.param.snapshot_prefix, bool(args.weights))}", file=screen)
    return 0


def screen_for(args: argparse.Namespace) -> TextIO:
    """Where to say how it goes: the standard output, unless a file takes that. SpecError where two would."""
    given = [args.log, args.metrics].count(str(STANDARD_OUTPUT))
    if given > 1:
        raise SpecError("--log - and --metrics - exclude each other", hint="the standard output can hold one of them: name a file for the other")
    return sys.stderr if given else sys.stdout


def apply_flags(spec: SolverSpec, args: argparse.Namespace) -> None:
    """Writes --weights, --iterations, --level and --stage into the solver, by Caffe's rules. SpecError for flags that exclude each other."""
    param = spec.param
    if args.snapshot and args.weights:
        raise SpecError("--snapshot and --weights exclude each other", hint="--snapshot goes on with a run; --weights starts a new one from trained weights")
    if args.weights or args.snapshot not in (None, "auto"):  # the flag's replace the solver's, and a restored state has its own
        del param.weights[:]
    param.weights.extend(args.weights or [])
    if args.iterations is not None:
        param.max_iter = args.iterations
    if args.level:
        param.train_state.level = args.level
    param.train_state.stage.extend(args.stage)


def find_state(spec: SolverSpec, snapshot: str | None, screen: TextIO) -> Path | None:
    """The state to resume from, or None for a new run."""
    if snapshot != "auto":
        return Path(snapshot) if snapshot else None
    prefix = spec.param.snapshot_prefix
    found = find_newest(prefix, lambda text: print(f"caffelite: warning: {text}", file=sys.stderr))
    print(f"resuming from {found}" if found else f"no snapshot {prefix}_iter_*.solverstate yet: starting anew", file=screen)
    return found


def how_to_go_on(progress: ProgressLine, prefix: str, weights: bool) -> str:
    """What to say after a stop. weights: whether the run was given --weights."""
    states = states_of(prefix)
    if progress.state is None or not states:
        return "no snapshot was written in this run"
    flag = f"--snapshot {'auto' if states[-1][1] == progress.state else progress.state}" + (" instead of --weights" if weights else "")
    return f"the same command with {flag} goes on from {'here' if progress.kept == progress.iteration else f'iteration {progress.kept:,}'}"


def closing_lines(progress: ProgressLine, chance: dict[str, float], seconds: float) -> list[str]:
    """What is said at the end: how far, how good next to chance, and where the weights are."""
    lines = [f"{'stopped' if progress.stopped else 'done'} at iteration {progress.iteration:,} after {duration(seconds)}"]
    width = max([8, *(len(label) for label in progress.scores)])
    for label, value in progress.scores.items():
        lines.append(f"  {label:{width}}  {value:.4f}" + (f" (chance {chance[label]:.4f})" if label in chance else ""))
    if progress.best:
        output, value, iteration, model = progress.best
        lines.append(f"  {'best':{width}}  {output} {value:.4f} at iteration {iteration:,}: {model}")
    if progress.model:
        lines.append(f"  {'snapshot':{width}}  {progress.model}")
    return lines
