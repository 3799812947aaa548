"""Trains a net twice on drawn images, once of a piece and once killed (SIGKILL) and resumed, and compares the two byte for byte.

    python benchmarks/gpu_training.py [--net nin_crop48] [--iterations 2000] [--precision bfloat16]

Fails where a loss is not finite, where the last losses are not below the first (unless --loss-may-rise), or where weights and solver state of
the two differ. It says where the second run was killed and from where it went on, and prints the metrics of the first. The solver is the shipped
one of that net, with four snapshots.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_rate import caffelite, make_database
from surroundings import ROOT, environment

from caffelite.schema import read_net, read_solver, to_text

NETS = ("nin_crop48", "nin_quick")
SNAPSHOTS = 4
LOOK_SECONDS = 0.02
AT_LAST = 4  # losses that have to be below the first


def solver_file(folder: Path, data: Path, args: argparse.Namespace) -> Path:
    """The shipped solver and net, reading the drawn databases, of so many iterations; returns the solver's path."""
    folder.mkdir()
    net, param = read_net(ROOT / "models" / args.net / "train_val.prototxt").param, read_solver(ROOT / "solvers" / f"{args.net}.prototxt").param
    for layer in net.layer:
        if layer.type == "Data":
            layer.data_param.source = str(data / Path(layer.data_param.source).name)
            layer.data_param.batch_size = args.batch
    (folder / "net.prototxt").write_text(to_text(net))
    param.net, param.snapshot_prefix, param.max_iter = str(folder / "net.prototxt"), str(folder / "run"), args.iterations
    param.snapshot = max(args.iterations // SNAPSHOTS, 1)
    param.display = max(args.iterations // 40, 1)
    param.test_interval, param.random_seed = args.iterations, 1
    for name in ("snapshot_best", "snapshot_keep", "stepvalue", "average_loss"):
        param.ClearField(name)
    if param.lr_policy == "multistep":
        param.stepvalue.append(args.iterations * 3 // 4)
    (folder / "solver.prototxt").write_text(to_text(param))
    return folder / "solver.prototxt"


def train_and_kill(solver: Path, machine: list[str], seconds: float) -> int:
    """Starts a training and kills it after its second snapshot, or as soon after as it has gone on; the last iteration in its metrics."""
    command = [sys.executable, "-m", "caffelite", "train", "--solver", str(solver), *machine]
    metrics, end = solver.parent / "run_metrics.jsonl", time.perf_counter() + seconds
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None and time.perf_counter() < end:
            found = records(metrics)
            written = [record["iteration"] for record in found if record["event"] == "snapshot"]
            if len(written) >= 2 and found[-1]["event"] == "train" and found[-1]["iteration"] > written[1]:
                break
            time.sleep(LOOK_SECONDS)
        if process.poll() is not None:
            sys.exit(f"gpu_training: the run ended (exit status {process.returncode}) before it could be killed; more --iterations give more time")
    finally:
        process.kill()
        process.wait()
    return int(records(metrics)[-1]["iteration"])


def records(metrics: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file that may still be written to."""
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def check(folders: list[Path], iterations: int, *, falls: bool = True) -> list[str]:
    """What is wrong with the two runs. falls: whether the loss has to."""
    wrong = []
    for folder in folders:
        losses = [record["loss"] for record in records(folder / "run_metrics.jsonl") if record["event"] == "train"]
        if not all(isinstance(loss, float) and math.isfinite(loss) for loss in losses):
            wrong.append(f"{folder.name}: a loss is not finite: {losses}")
        elif falls and max(losses[-AT_LAST:]) >= losses[0]:
            wrong.append(f"{folder.name}: the loss did not fall: {losses[0]} at first, {losses[-AT_LAST:]} at last")
    for ending in ("caffemodel", "solverstate"):
        first, second = (folder / f"run_iter_{iterations}.{ending}" for folder in folders)
        if _without_paths(first, folders) != _without_paths(second, folders):
            wrong.append(f"{second.name}: the resumed run's differs from the whole run's")
    return wrong


def _without_paths(file: Path, folders: list[Path]) -> bytes:
    """A file's bytes, with the name of its folder, which a solver state holds, made one; the names are equally long."""
    content = file.read_bytes()
    for folder in folders:
        content = content.replace(str(folder).encode(), b"folder")
    return content


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", choices=NETS, default=NETS[0])
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--precision", choices=("bfloat16", "tf32", "float32"), default="bfloat16")
    parser.add_argument("--images", type=int, default=6000, help="drawn for training (default: 6000)")
    parser.add_argument("--minutes", type=float, default=5, help="before the run that is to be killed is given up (default: 5)")
    parser.add_argument("--loss-may-rise", action="store_true", help="for runs of a few iterations")
    parser.add_argument("--gpu", default="0", metavar="ID")
    args = parser.parse_args()
    machine = ["--gpu", args.gpu, "--precision", args.precision]
    with tempfile.TemporaryDirectory() as name:
        data = make_database(Path(name), args.images, -(-args.batch // 20)).parent
        folders = [Path(name) / "whole", Path(name) / "parts"]
        whole, parts = (solver_file(folder, data, args) for folder in folders)
        started = time.perf_counter()
        caffelite("train", "--solver", whole, *machine)
        seconds = time.perf_counter() - started
        killed = train_and_kill(parts, machine, 60 * args.minutes)
        caffelite("train", "--solver", parts, "--snapshot", "auto", *machine)
        resumed = [record["iteration"] for record in records(folders[1] / "run_metrics.jsonl") if record["event"] == "start"]
        wrong = check(folders, args.iterations, falls=not args.loss_may_rise)
        print(f"{args.net}, batch {args.batch}, {args.precision}: {args.iterations} iterations in {seconds:.1f} s")
        print(f"killed after iteration {killed} was shown, went on from {resumed[-1]}")
        print((folders[0] / "run_metrics.jsonl").read_text(), end="")
    print(*(wrong or ["weights and solver state of the resumed run equal the whole run's; all losses are finite"]), sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
