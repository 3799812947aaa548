"""caffelite mean: the mean image of a database, as Caffe's compute_image_mean writes it."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing

from caffelite.cli.common import Parser, json_text, named_file, number
from caffelite.cli.live import CountLine


def build_parser(prog: str) -> Parser:
    parser = Parser(
        prog,
        "Computes the mean image of a database (for transform_param's mean_file) and prints the mean of each channel (for mean_value).",
        f"{prog} data/tiny-imagenet/train_lmdb mean.binaryproto",
    )
    parser.add_argument("database", metavar="DB", help="the LMDB folder")
    parser.add_argument(
        "out", nargs="?", type=named_file, metavar="OUT", help="the mean image's file (.binaryproto); without it only the channels' means are printed"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def run(args: argparse.Namespace) -> int:
    from caffelite.data.mean import channel_means, compute_mean, write_mean

    with closing(CountLine(sys.stderr, "reading", "records")) as progress:
        mean = compute_mean(args.database, progress)
    if args.out:
        write_mean(mean, args.out)
    means = channel_means(mean)
    if args.json:
        print(json_text({"database": args.database, "shape": list(mean.shape), "mean_value": means, "file": args.out}))
        return 0
    print(f"{args.database}: {' x '.join(map(str, mean.shape))} (channels, height, width)" + (f", mean image in {args.out}" if args.out else ""))
    for value in means:
        print(f"mean_value: {number(value)}")
    return 0
