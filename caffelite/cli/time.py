"""caffelite time: how long layers take forward and backward, or how long whole training steps take."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil, inf
from statistics import median
from typing import Any

from caffelite.backends.contract import Backend
from caffelite.cli.common import (
    Parser,
    add_machine_flags,
    add_state_flags,
    driver_of,
    json_text,
    machine_name,
    open_backend,
    peak_device_mb,
    table,
    whole_number,
)
from caffelite.cli.out_of_memory import explained, nets_of
from caffelite.cli.roofline import gpu_lines, gpu_table, roofline_row
from caffelite.cli.specs import gpu_of, gpu_place, load_net, load_solver
from caffelite.errors import SpecError
from caffelite.net import Net, Step
from caffelite.schema import NetSpec, SolverSpec, pb
from caffelite.solver.config import NetChoice

HEAD = ("layer", "type", "forward ms", "GFLOP/s", "backward ms", "GFLOP/s")
WARM_UP_STEPS = 3
RUNS = 10  # of several steps each, where a device runs ahead
FILLS, FILLED, MOST_PLAYS = 100, 1 << 18, 1000  # in a play of Lead; floats filled each time; plays before a round
Marks = tuple[Any, Any] | None  # before and after what is timed; None where nothing ran


def build_parser(prog: str) -> Parser:
    parser = Parser(
        prog,
        "With --model: times each layer's forward and backward (medians).\nWith --solver: times whole training steps: forward, backward and update.",
        f"{prog} --solver solvers/nin.prototxt --precision bfloat16 --iterations 20 --json",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="NET", help="the net (prototxt) to time layer by layer")
    which.add_argument("--solver", metavar="SOLVER", help="the solver (prototxt) whose training steps to time")
    parser.add_argument("--iterations", type=whole_number(1), default=50, metavar="N", help="timed rounds after the warm-up (default: 50)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    add_state_flags(parser, phase=True)
    add_machine_flags(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    if args.solver:
        result = time_steps(args)
        print(json_text(result) if args.json else "\n".join(_step_lines(result)))
    else:
        result = time_layers(args)
        print(json_text(result) if args.json else "\n".join(_layer_lines(result)))
    return 0


def peak_rss_mb() -> float | None:
    """The most memory this process has held, in megabytes of 2^20; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def _device_facts(backend: Backend) -> dict[str, Any]:
    """driver and peak_device_mb of a GPU; nothing of a CPU."""
    facts = {"driver": driver_of(backend), "peak_device_mb": peak_device_mb(backend)}
    return {name: value for name, value in facts.items() if value is not None}


# --- layers ------------------------------------------------------------------------------------------------------------


@dataclass
class LayerTimes:
    """Seconds of one layer, one entry a round."""

    step: Step
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)


def time_layers(args: argparse.Namespace) -> dict[str, Any]:
    """Median milliseconds of each layer, and of whole passes."""
    backend, phase = open_backend(args), pb.Phase.Value(args.phase)
    spec = load_net(args.model)
    with explained(lambda: [NetChoice(spec, args.model, phase, args.level, tuple(args.stage))], args.precision):
        return _timed_layers(args, backend, spec)


def _timed_layers(args: argparse.Namespace, backend: Backend, spec: NetSpec) -> dict[str, Any]:
    net = Net(spec, phase=pb.Phase.Value(args.phase), backend=backend, level=args.level, stages=args.stage, precision=args.precision)
    try:
        _time_round(net, [LayerTimes(step) for step in net.steps], backend)
        initial_loss = net.loss()
        layers, peaks = [LayerTimes(step) for step in net.steps], backend.peaks(args.precision)
        lead = Lead(backend) if peaks else None
        for _ in range(args.iterations):
            _time_round(net, layers, backend, lead)
    finally:
        net.close()
    rows = [_layer_row(layer) for layer in layers]
    if backend.name == "cuda":
        rows = [row | roofline_row(layer.step, row, peaks) for row, layer in zip(rows, layers)]
    forward = median(map(sum, zip(*(layer.forward for layer in layers))))
    backward = median(map(sum, zip(*(layer.backward for layer in layers))))
    return {
        "net": net.name,
        "phase": args.phase,
        "backend": backend.name,
        "precision": args.precision,
        "iterations": args.iterations,
        "batch": net.batch_size,
        "initial_loss": initial_loss,
        "layers": rows,
        "forward_ms": forward * 1e3,
        "backward_ms": backward * 1e3,
        "images_per_s": net.batch_size / (forward + backward),
        "peak_rss_mb": peak_rss_mb(),
        **_device_facts(backend),
        **({"peaks": peaks._asdict()} if peaks else {}),
    }


class Lead:
    """Work that keeps a GPU busy while the host asks for a round: else a layer would take at least as long as asking for it does.

    It is filling an array again and again, recorded; half as much again as the host needed for the quickest round so far."""

    def __init__(self, backend: Backend) -> None:
        self.filled = backend.empty((FILLED,), "float32")

        def fills() -> None:
            for _ in range(FILLS):
                backend.fill(self.filled, 0.0)

        self._play = backend.repeatable(fills)
        for _ in range(2):  # once as it is, once to be recorded
            self._play()
        start = backend.mark()
        self._play()
        self._seconds = backend.seconds_between(start, backend.mark())
        self.host = 0.0  # seconds that the host needed for a round

    def take(self) -> None:
        for _ in range(min(MOST_PLAYS, ceil(1.5 * self.host / max(self._seconds, 1e-6)))):
            self._play()


def _time_round(net: Net, layers: list[LayerTimes], backend: Backend, lead: Lead | None = None) -> None:
    net.refresh()  # brings the weights' bfloat16 copies up to date, outside every layer's time
    if lead:
        lead.take()
    net.zero_grads()
    started = time.perf_counter()
    marks: list[tuple[list[float], Marks]] = []
    for layer in layers:
        fused = layer.step.node.forward_fused
        marks += [(layer.forward, None if fused else _marked(net.forward_step, layer.step, backend))]
    for layer in reversed(layers):
        runs = net.has_backward and layer.step.node.runs_backward
        marks += [(layer.backward, _marked(net.backward_step, layer.step, backend) if runs else None)]
    if lead:
        lead.host = min(lead.host or inf, time.perf_counter() - started)  # the host may have waited for room in the device's queue
    for seconds, pair in marks:  # read after the round, so that a GPU does not wait between layers
        seconds.append(backend.seconds_between(*pair) if pair else 0.0)


def _marked(call: Callable[[Step], None], step: Step, backend: Backend) -> Marks:
    start = backend.mark()
    call(step)
    return start, backend.mark()


def _layer_row(times: LayerTimes) -> dict[str, Any]:
    node = times.step.node
    work = 2 * node.layer.multiply_adds([b.shape for b in node.bottoms])  # a multiply and an add
    passes = any(node.propagate_down) + any(node.learn)  # one product for the data, one for the weights
    forward, backward = median(times.forward), median(times.backward)
    return {
        "name": node.name,
        "type": node.layer.type,
        "forward_ms": forward * 1e3,
        "backward_ms": backward * 1e3,
        "forward_gflops": work / forward / 1e9 if forward and work else None,
        "backward_gflops": passes * work / backward / 1e9 if backward and work else None,
        "fused": node.forward_fused,
        "backward_fused": node.backward_fused,
    }


def _layer_lines(result: dict[str, Any]) -> list[str]:
    rows = gpu_table(result) if result["backend"] == "cuda" else _cpu_table(result)
    both = result["forward_ms"] + result["backward_ms"]
    machine = machine_name(result["backend"], result.get("driver"))
    lines = [f"{result['net'] or 'unnamed net'}, phase {result['phase']}, {machine}, {result['precision']}, batch {result['batch']}, "]
    lines[0] += f"medians of {result['iterations']} rounds"
    lines += ["", *table(rows, left=2), ""]
    passes = f"forward {result['forward_ms']:.3f} ms, backward {result['backward_ms']:.3f} ms, together {both:.3f} ms"
    lines.append(f"{passes} ({result['images_per_s']:,.1f} images/s)")
    return lines + (gpu_lines(result) if result["backend"] == "cuda" else [])


def _cpu_table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [HEAD]
    for layer in result["layers"]:
        forward = "fused" if layer["fused"] else f"{layer['forward_ms']:.3f}"
        backward = "fused" if layer["backward_fused"] else f"{layer['backward_ms']:.3f}" if layer["backward_ms"] else ""
        rates = [f"{rate:,.1f}" if rate else "" for rate in (layer["forward_gflops"], layer["backward_gflops"])]
        rows.append((layer["name"], layer["type"], forward, rates[0], backward, rates[1]))
    return rows


# --- training steps ----------------------------------------------------------------------------------------------------


def time_steps(args: argparse.Namespace) -> dict[str, Any]:
    """Median milliseconds of one training step: forward, backward (iter_size times) and update, input included."""
    spec = load_solver(args.solver)
    if args.phase != "TRAIN":
        raise SpecError("--phase TEST does not go with --solver: a training step is in phase TRAIN")
    backend = open_backend(args, gpu_mode=gpu_place(spec), device=gpu_of(spec))
    param = spec.param
    for name in ("test_iter", "test_net", "test_net_param", "test_state", "test_interval", "snapshot", "snapshot_best", "display"):
        param.ClearField(name)
    # Keeps a poly rate, which reaches zero at max_iter, defined however many steps are timed.
    param.max_iter = max(param.max_iter, args.iterations + WARM_UP_STEPS)
    if args.level:
        param.train_state.level = args.level
    param.train_state.stage.extend(args.stage)
    with explained(lambda: nets_of(spec), args.precision, param):
        return _timed_steps(args, backend, spec)


def _timed_steps(args: argparse.Namespace, backend: Backend, spec: SolverSpec) -> dict[str, Any]:
    from caffelite.solver.loop import Solver

    param, solver = spec.param, Solver(spec, backend=backend, precision=args.precision)
    try:
        solver.step(WARM_UP_STEPS)
        # A device that runs ahead is asked for several steps at once, as in training: waiting for each would be timed too.
        together = max(1, args.iterations // RUNS) if backend.runs_ahead else 1
        seconds = []
        for _ in range(args.iterations // together):
            start = time.perf_counter()
            solver.step(together)
            backend.synchronize()
            seconds.append((time.perf_counter() - start) / together)
    finally:
        solver.close()
    step, images = median(seconds), solver.net.batch_size * max(param.iter_size, 1)
    return {
        "solver": args.solver,
        "net": solver.net.name,
        "backend": backend.name,
        "precision": args.precision,
        "iterations": args.iterations,
        "steps_at_once": together,
        "batch": images,
        "step_ms": step * 1e3,
        "step_ms_min": min(seconds) * 1e3,
        "step_ms_max": max(seconds) * 1e3,
        "images_per_s": images / step,
        "peak_rss_mb": peak_rss_mb(),
        **_device_facts(backend),
    }


def _step_lines(result: dict[str, Any]) -> list[str]:
    memory = f", peak memory {result['peak_rss_mb']:,.0f} MB" if result["peak_rss_mb"] else ""
    memory += f", of the GPU's {result['peak_device_mb']:,.0f} MB" if "peak_device_mb" in result else ""
    machine = machine_name(result["backend"], result.get("driver"))
    count = str(result["iterations"]) if result["steps_at_once"] == 1 else f"runs of {result['steps_at_once']} steps"
    return [
        f"{result['net'] or result['solver']}, {machine}, {result['precision']}, {result['batch']} images a step",
        f"training step {result['step_ms']:.2f} ms (median of {count}; {result['step_ms_min']:.2f} to {result['step_ms_max']:.2f})",
        f"{result['images_per_s']:,.1f} images/s{memory}",
    ]
