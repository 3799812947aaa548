"""caffelite convert: images into an LMDB of Datums, as Caffe's tools write it."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Collection, Sequence
from contextlib import closing

from caffelite.cli.common import Parser, named_file, one_of, whole_number
from caffelite.cli.live import CountLine

FEW = 6  # classes that are listed
KINDS = ("imagefolder", "list", "tiny-imagenet", "mnist", "cifar10")
EPILOG = """kinds:
  imagefolder    SRC/CLASS/IMAGE: one folder a class, in the order of wnids.txt if there is one, else by name
  list           SRC is a text file of lines "PATH LABEL"
  tiny-imagenet  a folder in Tiny ImageNet's layout; writes DST/train_lmdb and DST/val_lmdb
  mnist          the folder of MNIST's idx files
  cifar10        the folder of CIFAR-10's batches"""


def build_parser(prog: str) -> Parser:
    parser = Parser(
        prog,
        "Turns images into LMDB databases for Data layers. A database appears under its name only when it is whole.\n\n" + EPILOG,
        f"{prog} tiny-imagenet tiny-imagenet-200 data/tiny-imagenet",
    )
    parser.add_argument("kind", type=one_of(*KINDS), metavar="KIND", help="how the source is laid out: " + ", ".join(KINDS))
    parser.add_argument("source", metavar="SRC", help="the folder (or list file) to read")
    parser.add_argument("destination", type=named_file, metavar="DST", help="the database to write (imagefolder, list), or the folder for several")
    parser.add_argument("--root", metavar="DIR", help="the folder a list's paths start from (default: the list's own)")
    parser.add_argument("--split", metavar="NAME", help="only this part of the data set: train, val or test")
    parser.add_argument("--resize", type=height_and_width, metavar="HxW", help="resize every image to this height and width, 64x64 say")
    parser.add_argument("--gray", action="store_true", help="store one channel")
    parser.add_argument("--shuffle", action="store_true", help="write the records in random order")
    parser.add_argument("--seed", type=whole_number(0), default=0, metavar="N", help="of the random order (default: 0)")
    parser.add_argument("--encoded", action="store_true", help="store compressed images instead of pixels: smaller, slower to read")
    parser.add_argument("--encode-type", default="", metavar="TYPE", help="png or jpg; implies --encoded (default with --encoded: as the file is)")
    parser.add_argument("--threads", type=whole_number(1), metavar="N", help="how many images to decode at a time (default: one a processor)")
    parser.add_argument("--allow-bad", action="store_true", help="leave out images that cannot be read instead of failing")
    parser.add_argument("--force", action="store_true", help="replace databases that exist")
    return parser


def height_and_width(text: str) -> tuple[int, int]:
    """An argparse type for "64x48": (height, width)."""
    match = re.fullmatch(r"([1-9]\d*)[xX]([1-9]\d*)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"'{text}' is not HEIGHTxWIDTH, 64x64 say")
    return int(match[1]), int(match[2])


def listed(names: Sequence[str]) -> str:
    """The first names, and the last one of many, each with its number."""
    numbered = [f"{number} {name}" for number, name in enumerate(names)]
    return ", ".join(numbered if len(names) <= FEW else [*numbered[: FEW - 1], "...", numbered[-1]])


def size_warning(sizes: Collection[tuple[int, int]]) -> str:
    """What to say of images that are not all of one size."""
    low, high = (tuple(pick(size[axis] for size in sizes) for axis in (0, 1)) for pick in (min, max))
    span = f"heights from {low[0]} to {high[0]}, widths from {low[1]} to {high[1]}"
    return f"the images are not all of one size ({span}): a net that reads them needs a crop_size of at most {min(low)}; or convert them with --resize"


def run(args: argparse.Namespace) -> int:
    from caffelite.data.convert import convert_dataset

    with closing(CountLine(sys.stderr, "converting")) as progress:
        report = convert_dataset(
            args.kind,
            args.source,
            args.destination,
            root=args.root,
            resize=args.resize,
            gray=args.gray,
            encoded=args.encoded,
            encode_type=args.encode_type,
            shuffle=args.shuffle,
            seed=args.seed,
            threads=args.threads,
            split=args.split,
            allow_bad=args.allow_bad,
            force=args.force,
            progress=progress,
            tell=lambda text: print(f"caffelite: warning: {text}", file=sys.stderr),
        )
    for path, reason in report.bad:
        print(f"caffelite: warning: left out {path}: {reason}", file=sys.stderr)
    for database in report.databases:
        print(f"{database.path}: {database.count:,} records, sha256 {database.checksum}")
    if report.classes:
        print(f"{len(report.classes):,} classes: {listed(report.classes)}")
    if sorted_ones := [database.path for database in report.databases if database.class_by_class]:
        print(f"{' and '.join(sorted_ones)}: class by class; where it is to train a net, say shuffle: true in data_param, or convert with --shuffle")
    if len(report.sizes) > 1:
        print(f"caffelite: warning: {size_warning(report.sizes)}", file=sys.stderr)
    left_out = f", {len(report.bad):,} left out" if report.bad else ""
    print(f"{report.count:,} images in {report.seconds:.1f} s ({report.count / max(report.seconds, 1e-9):,.0f} images/s){left_out}")
    return 0
