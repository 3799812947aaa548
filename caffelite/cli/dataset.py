"""caffelite dataset synth: a synthetic data set in Tiny ImageNet's layout."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing

from caffelite.cli.common import Parser, named_file, one_of, whole_number
from caffelite.cli.live import CountLine


def build_parser(prog: str) -> Parser:
    parser = Parser(
        prog,
        "Draws 64x64 JPEGs of shapes and textures in Tiny ImageNet's folder layout; the same seed draws the same images.",
        f"{prog} synth data/synth-images --train 300 --val 50 --seed 0",
    )
    parser.add_argument("kind", type=one_of("synth"), metavar="synth", help="which data set: synth is the only one")
    parser.add_argument("destination", type=named_file, metavar="DST", help="the folder to make; it must not exist")
    parser.add_argument("--classes", type=whole_number(2), default=20, metavar="N", help="how many classes (default: 20)")
    parser.add_argument("--train", type=whole_number(1), default=300, metavar="N", help="training images of each class (default: 300)")
    parser.add_argument("--val", type=whole_number(1), default=50, metavar="N", help="validation images of each class (default: 50)")
    parser.add_argument("--size", type=whole_number(8), default=64, metavar="N", help="height and width in pixels (default: 64)")
    parser.add_argument("--seed", type=whole_number(0), default=0, metavar="N", help="another seed draws other images (default: 0)")
    parser.add_argument("--threads", type=whole_number(1), metavar="N", help="how many processors to use (default: all)")
    return parser


def run(args: argparse.Namespace) -> int:
    from caffelite.data.synth import generate

    with closing(CountLine(sys.stderr, "drawing")) as progress:
        report = generate(
            args.destination,
            classes=args.classes,
            train_per_class=args.train,
            val_per_class=args.val,
            seed=args.seed,
            size=args.size,
            threads=args.threads,
            progress=progress,
        )
    print(f"{args.destination}: {len(report.classes)} classes, {report.train:,} training and {report.val:,} validation images")
    return 0
