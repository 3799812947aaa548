"""caffelite test: scores a net with weights on its TEST data."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from caffelite.backends.contract import Backend
from caffelite.cli.caffe_log import output_lines
from caffelite.cli.chance import net_chances
from caffelite.cli.common import Parser, add_machine_flags, add_state_flags, driver_of, json_text, number, open_backend, whole_number
from caffelite.cli.out_of_memory import explained
from caffelite.cli.specs import load_net
from caffelite.errors import SpecError
from caffelite.net import Net
from caffelite.schema import NetSpec, pb
from caffelite.solver.config import NetChoice
from caffelite.solver.listeners import Output
from caffelite.solver.scoring import Scorer, outputs_of
from caffelite.weights import left_to_fillers


def build_parser(prog: str) -> Parser:
    parser = Parser(
        prog,
        "Scores a net in phase TEST with trained weights. Without --iterations the whole database is scored, every record once.",
        f"{prog} --model models/nin/train_val.prototxt --weights runs/nin/nin_best.caffemodel",
    )
    parser.add_argument("--model", required=True, metavar="NET", help="the net (prototxt)")
    parser.add_argument("--weights", required=True, metavar="FILE", help="the trained weights (.caffemodel); several with commas, by layer name")
    parser.add_argument("--iterations", type=whole_number(1), metavar="N", help="how many batches to score (default: the whole database once)")
    parser.add_argument("-v", "--verbose", action="store_true", help="also print the outputs of each batch")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    add_state_flags(parser, phase=False)
    add_machine_flags(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    backend, spec = open_backend(args), load_net(args.model)
    with explained(lambda: [NetChoice(spec, args.model, pb.TEST, args.level, tuple(args.stage), args.iterations)], args.precision):
        return _score(args, backend, spec)


def _score(args: argparse.Namespace, backend: Backend, spec: NetSpec) -> int:
    net = Net(spec, phase=pb.TEST, backend=backend, level=args.level, stages=args.stage, precision=args.precision)
    scorer: Scorer | None = None
    try:
        net.copy_from(args.weights)
        if left := left_to_fillers(net):
            print(f"caffelite: warning: {args.weights}: {left}", file=sys.stderr)
        scorer = _scorer(net, args)
        if not args.json:
            print(f"Running for {scorer.batches} iterations.")
        started = time.perf_counter()
        scores = scorer.run()
        seconds = time.perf_counter() - started
    finally:
        if scorer:
            scorer.close()
        net.close()
    assert scores is not None  # nobody asked to stop
    result = {
        "net": net.name,
        "weights": args.weights,
        "backend": backend.name,
        **({"driver": driver} if (driver := driver_of(backend)) else {}),
        "precision": args.precision,
        "iterations": scorer.batches,
        "records": scores.records,
        "loss": scores.loss,
        "outputs": {o.blob: o.values[0] if len(o.values) == 1 else list(o.values) for o in scores.outputs},
        "chance": net_chances(net),
        "seconds": seconds,
        "images_per_s": scores.records / seconds if scores.records else None,
    }
    print(json_text(result) if args.json else "\n".join(_lines(result, scores.outputs)))
    return 0


def _scorer(net: Net, args: argparse.Namespace) -> Scorer:
    try:
        return Scorer(net, args.iterations, _Batches() if args.verbose and not args.json else None)
    except SpecError as error:
        error.hint = "give --iterations: the number of batches to score"  # the scorer speaks of a solver's test_iter
        raise


class _Batches:
    """Runs a net forward and prints the scalars of each batch, as Caffe does."""

    def __init__(self) -> None:
        self.done = 0

    def __call__(self, net: Net) -> None:
        net.forward()
        for output in outputs_of(net):
            for value in output.values:
                print(f"Batch {self.done}, {output.blob} = {number(value)}")
        self.done += 1


def _lines(result: dict[str, Any], outputs: Sequence[Output]) -> list[str]:
    lines = [f"Loss: {number(result['loss'])}", *output_lines(outputs)]
    records = f"{result['records']:,} records in " if result["records"] else ""
    rate = f" ({result['images_per_s']:,.0f} images/s)" if result["images_per_s"] else ""
    lines.append(f"{records}{result['seconds']:.1f} s{rate}")
    chance = [f"chance would reach {blob} = {number(value)}" for blob, value in result["chance"].items()]
    return lines + chance
