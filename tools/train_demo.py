"""What `make train` does: prepares images, trains a narrow NIN on them through the command line, and draws its curves.

    python tools/train_demo.py                                  # a drawn data set of 20 classes
    python tools/train_demo.py --data /path/to/tiny-imagenet-200

Each command is printed before it runs and can be typed as it stands. What is there already is used again: images, databases,
and the newest snapshot, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from caffelite.schema import read_net, read_solver, to_text

ROOT = Path(__file__).resolve().parent.parent
MODEL, SOLVER = Path("models/nin_quick/train_val.prototxt"), Path("solvers/nin_quick.prototxt")
DRAWN = Path("data/synth")  # the folder of databases that MODEL names


class StepFailed(Exception):
    """A command ended with an error, which it has told; holds its exit status."""


class Stopped(Exception):
    """A signal, whose number this holds, ended a command before its work was done."""


def caffelite(*words: str | Path) -> None:
    """Runs one command in sight of the user. StepFailed when it fails, Stopped when a signal came.

    The command is waited for after a signal too: it is the one that knows how to end, `train` with a snapshot.
    """
    print("\n$ caffelite", shlex.join(map(str, words)), flush=True)
    signals: list[int] = []
    processes: list[subprocess.Popen[bytes]] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        if number == signal.SIGTERM:  # Ctrl-C reaches the command from the terminal
            for process in processes:
                process.terminate()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        processes.append(subprocess.Popen([sys.executable, "-m", "caffelite", *map(str, words)]))
        status = processes[0].wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if signals:
        raise Stopped(signals[0])
    if status:
        raise StepFailed(status)


def prepare(data: Path | None) -> Path:
    """The folder of databases, made from `data` (a folder in Tiny ImageNet's layout) or from drawn images."""
    databases = Path("data") / data.resolve().name if data else DRAWN
    if all((databases / f"{split}_lmdb").is_dir() for split in ("train", "val")):
        print(f"using the databases in {databases} (remove that folder to make them again)")
        return databases
    if data is None:
        data = Path("data/synth-images")
        if not data.is_dir():
            caffelite("dataset", "synth", data)
    caffelite("convert", "tiny-imagenet", data, databases)
    return databases


def fitted_solver(databases: Path) -> Path:
    """A solver for these databases: the one shipped, or a copy whose net reads them and has an output for each class."""
    classes = len((databases / "labels.txt").read_text().splitlines())
    if databases == DRAWN and classes == 20:
        return SOLVER
    net, solver = read_net(MODEL).param, read_solver(SOLVER).param
    for layer in net.layer:
        if layer.type == "Data":
            layer.data_param.source = str(databases / Path(layer.data_param.source).name)
    last = [layer for layer in net.layer if layer.type == "Convolution"][-1]
    last.convolution_param.num_output = classes
    folder = Path("runs") / databases.name
    folder.mkdir(parents=True, exist_ok=True)
    solver.net, solver.snapshot_prefix = str(folder / "train_val.prototxt"), str(folder / "nin_quick")
    Path(solver.net).write_text(to_text(net))
    path = folder / "solver.prototxt"
    path.write_text(to_text(solver))
    return path


def fast_precision() -> str:
    """bfloat16 where this processor computes with it, else float32."""
    command = [sys.executable, "-m", "caffelite", "device-query", "--json"]
    facts = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    onednn = facts["backends"]["onednn"]
    return "bfloat16" if onednn["loads"] and onednn["precisions"]["bfloat16"] == "fast" else "float32"


def closing_lines(solver: Path, picture: Path) -> list[str]:
    """Where everything is, and the last accuracy next to chance."""
    param = read_solver(solver).param
    metrics = Path(f"{param.snapshot_prefix}_metrics.jsonl")
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    chance = next(record["chance"] for record in records if record["event"] == "start")
    accuracy = [record["outputs"]["accuracy"] for record in records if record["event"] == "test"][-1]
    return [
        f"accuracy  {accuracy:.3f} (chance {chance:.3f})",
        f"snapshot  {param.snapshot_prefix}_iter_{param.max_iter}.caffemodel",
        f"metrics   {metrics}",
        f"curves    {picture}",
    ]


def main() -> int:
    """Runs every step; returns the exit status of the first command that fails."""
    parser = argparse.ArgumentParser(description="Trains a narrow NIN from scratch, as `make train` does.")
    parser.add_argument("--data", type=Path, metavar="DIR", help="images in Tiny ImageNet's layout (default: drawn ones)")
    data = parser.parse_args().data
    if data is not None and not (data / "wnids.txt").is_file():
        what = "no folder in Tiny ImageNet's layout (it has no wnids.txt)" if data.is_dir() else "no such folder"
        print(f"train_demo: {data}: {what}\n  docs/getting-started.md says how to train on images in folders of their classes", file=sys.stderr)
        return 2
    data = data and data.resolve()
    os.chdir(ROOT)  # the shipped files name their data from here
    try:
        solver = fitted_solver(prepare(data))
        caffelite("train", "--solver", solver, "--precision", fast_precision(), "--snapshot", "auto")
        prefix = read_solver(solver).param.snapshot_prefix
        picture = Path(f"{prefix}_curves.png")
        caffelite("plot", f"{prefix}_metrics.jsonl", "--out", picture)
    except StepFailed as failed:
        print(f"\ntrain_demo: the command above failed (exit status {failed})", file=sys.stderr)
        return int(failed.args[0])
    except Stopped as stopped:
        print("\nstopped; make train goes on from here")
        return 128 + int(stopped.args[0])
    print("\n" + "\n".join(closing_lines(solver, picture)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
