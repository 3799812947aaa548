"""How fast `caffelite train` is on images from a database, against the same net on data that is there already.

    python benchmarks/gpu_rate.py [--net nin_crop48] [--batch 128] [--precisions bfloat16 tf32] [--seconds 8]

Draws raw 64x64 images into an LMDB, then trains on it three times a precision: on DummyData, on the database, and on the database with
`cache: DEVICE`. Images a second are the median of the metrics' train records, the first of which is left out. --gpu: the GPU's number.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from nets import NETS, on_constants, on_database, write_solver
from surroundings import environment

from caffelite.schema import pb

RECORDS = 10  # train records of a run
SOURCES = ("DummyData", "database", "database, cache: DEVICE")


def caffelite(*words: object) -> str:
    """Runs a command of caffelite; what it prints. Ends this program where it fails."""
    command = [sys.executable, "-m", "caffelite", *map(str, words)]
    done = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"caffelite {' '.join(map(str, words))} failed (exit status {done.returncode})\n{done.stdout[-2000:]}")
    return done.stdout


def make_database(folder: Path, images: int, val: int = 1) -> Path:
    """A database of raw drawn images of 20 classes, `images` in all, and one beside it of `val` images a class."""
    caffelite("dataset", "synth", folder / "images", "--train", max(images // 20, 1), "--val", val)
    caffelite("convert", "tiny-imagenet", folder / "images", folder / "synth")
    return folder / "synth" / "train_lmdb"


def training_rate(folder: Path, net: pb.NetParameter, iterations: int, machine: list[str]) -> float:
    """Images a second of a training of so many iterations."""
    solver, metrics = write_solver(folder, net, "rate"), folder / "metrics.jsonl"
    with solver.open("a") as file:
        print(f"display: {max(iterations // RECORDS, 1)}", file=file)
    caffelite("train", "--solver", solver, "--iterations", iterations, "--metrics", metrics, *machine)
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    rates = [record["images_per_s"] for record in records if record["event"] == "train" and "images_per_s" in record]
    return float(median(rates[1:] or rates))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", choices=NETS, default="nin_crop48")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--precisions", nargs="+", choices=("bfloat16", "tf32", "float32"), default=["bfloat16", "tf32"])
    parser.add_argument("--seconds", type=float, default=8, help="about so long each training (default: 8)")
    parser.add_argument("--images", type=int, default=6000, help="in the database (default: 6000)")
    parser.add_argument("--gpu", default="0", metavar="ID")
    args = parser.parse_args()
    print("| net | batch | precision | data | images/s | x DummyData |\n|---|---:|---|---|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = make_database(folder, args.images)
        dummy = on_constants(args.net, args.batch)
        nets = dict(zip(SOURCES, (dummy, *(on_database(args.net, args.batch, source, cached=cached) for cached in (False, True)))))
        for precision in args.precisions:
            machine = ["--gpu", args.gpu, "--precision", precision]
            timed = json.loads(caffelite("time", "--solver", write_solver(folder, dummy, "dummy"), "--iterations", "20", "--json", *machine))
            iterations = max(3, round(args.seconds * 1e3 / timed["step_ms"]))
            first = None
            for data, net in nets.items():
                rate = training_rate(folder, net, iterations, machine)
                first = first or rate
                print(f"| {args.net} | {args.batch} | {precision} | {data} | {rate:,.0f} | {rate / first:.2f} |", flush=True)


if __name__ == "__main__":
    main()
