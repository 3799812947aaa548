"""Everything to be known of a GPU, in four runs of nine minutes: does it compute correctly, how fast is it, and does it hold.

    python benchmarks/gpu.py OUT_FOLDER --call 1      # every test of the backend; first step times
    python benchmarks/gpu.py OUT_FOLDER --call 2      # step times beside PyTorch's, training from a database, layers, tiles
    python benchmarks/gpu.py OUT_FOLDER --call 3      # trainings killed and resumed, the sanitizer, more compiled PyTorch
    python benchmarks/gpu.py OUT_FOLDER --call 4      # step times, layers and tiles of VGG-16, ResNet-18, SqueezeNet and the AlexNet for 64x64
    python benchmarks/gpu.py OUT_FOLDER --dry-run     # all parts, tiny, on the emulator and PyTorch's CPU build: tries the scripts themselves

Each part has a share of --minutes; what one does not use the later ones have. A part writes OUT_FOLDER/<part>.log, whatever becomes of it, the
end of which is shown when it has ended; summary.txt says how each ended. --only names parts instead of a call.

For a machine without a network: `make gpu-wheels` on one that has it puts packages for Linux on x86-64 into build/wheels; what is missing here is
installed from there, into build/site. CuPy and PyTorch have to be there (without PyTorch its rows are missing).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gpu_tests import CUT_OFF, FIRST, bounded
from surroundings import ROOT, environment, gpu_driver

WHEELS, SITE = ROOT / "build" / "wheels", ROOT / "build" / "site"
IMPORTS = {  # what has to be imported, and the package that has it
    "numpy": "numpy",
    "google.protobuf": "protobuf",
    "PIL": "pillow",
    "lmdb": "lmdb",
    "ml_dtypes": "ml_dtypes",
    "pytest": "pytest pluggy iniconfig packaging pygments",
}
LEAST_SECONDS = 5.0
SHOWN = 40  # lines of each log
# Nets and batches whose steps are timed.
NETS = ("nin_crop48:128", "alexnet:256", "nin_crop48:512", "nin:128", "nin:512", "nin_quick:128", "lenet:64")
MORE_NETS = ("vgg16:128", "resnet18:128", "alexnet9:128", "resnet18:256", "vgg16:256", "alexnet9:256", "squeezenet:128")
SANITIZED = ("test_op_memory", *FIRST[:2], "test_op_pooling", "test_op_lrn", "test_op_lrn_pool", "test_op_pool_dropout", "test_op_batch_norm")
SANITIZED += ("test_op_losses", "test_op_activations", "test_op_transform")


class Part(NamedTuple):
    """A script of benchmarks/ with its flags, its call and its share of the time. MINUTES in a flag: what it has when it starts."""

    name: str
    call: int
    seconds: float
    command: tuple[str, ...]


def parts(out: str) -> Iterator[Part]:
    """All parts, the most important of each call first; `out`: the folder of results."""
    quick = ("bfloat16", "wgmma-bfloat16", "tma-bfloat16", "tuned-bfloat16", "tf32", "float32", "eager-bfloat16", "eager-tf32")
    slow = ("bfloat16", "tuned-bfloat16", "tf32", "compile-bfloat16", "compile-tf32")
    yield Part("prepare", 0, 40, ("gpu_prepare.py",))
    yield Part("tests", 1, 360, ("gpu_tests.py", "--minutes", "MINUTES", "--out", f"{out}/tests"))
    first = ("--nets", "nin_crop48:128", "alexnet:256", "--rounds", "3", "--modes", *quick)
    yield Part("first_steps", 1, 140, ("gpu_step.py", "--minutes", "MINUTES", "--out", f"{out}/first_steps", *first))
    yield Part("steps", 2, 200, ("gpu_step.py", "--minutes", "MINUTES", "--out", f"{out}/steps", "--nets", *NETS, "--rounds", "4", "--modes", *quick))
    yield Part("rate", 2, 90, ("gpu_rate.py", "--seconds", "5"))
    yield Part("layers", 2, 60, ("gpu_layers.py", "--out", f"{out}/layers"))
    yield Part("tiles", 2, 60, ("gpu_tiles.py",))
    first = ("--nets", "nin_crop48:128", "--rounds", "3", "--modes", *slow)
    yield Part("compiled", 2, 90, ("gpu_step.py", "--minutes", "MINUTES", "--out", f"{out}/compiled", *first))
    yield Part("training", 3, 70, ("gpu_training.py", "--net", "nin_crop48"))
    yield Part("training_quick", 3, 50, ("gpu_training.py", "--net", "nin_quick"))
    for tool, seconds in (("memcheck", 110), ("racecheck", 90), ("initcheck", 50)):
        prefix = f"compute-sanitizer --tool {tool} --error-exitcode 9"
        yield Part(tool, 3, seconds, ("gpu_tests.py", "--minutes", "MINUTES", "--out", f"{out}/{tool}", "--prefix", prefix, *SANITIZED))
    rest = ("--nets", "alexnet:256", "nin_crop48:512", "nin:128", "nin_quick:128", "--rounds", "3", "--modes", *slow)
    yield Part("compiled_rest", 3, 130, ("gpu_step.py", "--minutes", "MINUTES", "--out", f"{out}/compiled_rest", *rest))
    more = ("--nets", *MORE_NETS, "--rounds", "4", "--modes", *quick)
    yield Part("more_steps", 4, 240, ("gpu_step.py", "--minutes", "MINUTES", "--out", f"{out}/more_steps", *more))
    yield Part("more_layers", 4, 60, ("gpu_layers.py", "--out", f"{out}/layers", "--nets", *MORE_NETS[:3]))
    yield Part("more_tiles", 4, 40, ("gpu_tiles.py", "--nets", *MORE_NETS[:3]))
    more = ("--nets", *MORE_NETS[:3], "--rounds", "3", "--modes", *slow)
    yield Part("more_compiled", 4, 160, ("gpu_step.py", "--minutes", "MINUTES", "--out", f"{out}/more_compiled", *more))


SHRUNK = {  # flags that come last, and so win, in a dry run
    "tests": ("test_op_dropout", "test_op_memory"),
    "first_steps": ("--dry-run", "--modes", "bfloat16", "eager-bfloat16"),
    "steps": ("--dry-run", "--modes", "tf32", "eager-tf32"),
    "rate": ("--net", "nin_quick", "--batch", "1", "--precisions", "bfloat16", "--seconds", "0.1", "--images", "20"),
    "layers": ("--nets", "lenet:2", "--iterations", "1"),
    "tiles": ("--nets", "lenet:2"),
    "compiled": ("--dry-run", "--modes", "bfloat16", "compile-bfloat16"),
    "training": ("--net", "nin_quick", "--iterations", "12", "--batch", "2", "--images", "40", "--loss-may-rise"),
    "training_quick": ("--net", "nin_quick", "--iterations", "12", "--batch", "1", "--images", "40", "--precision", "tf32", "--loss-may-rise"),
    "compiled_rest": ("--dry-run", "--modes", "compile-tf32"),
    "more_steps": ("--dry-run", "--modes", "float32"),
    "more_layers": ("--nets", "lenet:2", "--iterations", "1"),
    "more_tiles": ("--nets", "lenet:2"),
    "more_compiled": ("--dry-run", "--modes", "compile-bfloat16"),
}


def chosen(args: argparse.Namespace) -> list[Part]:
    """The parts of this run. A sanitizer that is not installed leaves its time to the others."""
    found = [part for part in parts(str(args.out)) if (part.name in args.only if args.only else args.call is None or part.call in (0, args.call))]
    if not shutil.which("compute-sanitizer"):
        found = [part for part in found if "--prefix" not in part.command]
    if args.dry_run:
        found = [part._replace(command=(*part.command, *SHRUNK.get(part.name, ()))) for part in found]
    return found


def run(part: Part, out: Path, seconds: float) -> str:
    """Runs a part with its output in a file; how it ended, in a few words."""
    words = [f"{max(seconds - LEAST_SECONDS, LEAST_SECONDS) / 60:.3f}" if word == "MINUTES" else word for word in part.command]
    command = [sys.executable, str(ROOT / "benchmarks" / words[0]), *words[1:]]
    around = environment(SITE, PYTHONUNBUFFERED="1", CAFFELITE_CUDA_DRIVER=gpu_driver())
    started = time.perf_counter()
    with (out / f"{part.name}.log").open("w") as log:
        print("$", *command, file=log, flush=True)
        status = bounded(command, around, log, seconds)
    took = time.perf_counter() - started
    return f"cut off after {took:.0f} s" if status == CUT_OFF else f"exit status {status} after {took:.0f} s"


def install_missing() -> None:
    """Installs from WHEELS what cannot be imported, into SITE; what other packages were installed with stays as it is."""
    missing = [package for name, packages in IMPORTS.items() if not _found(name) for package in packages.split()]
    if not missing:
        return
    if not WHEELS.is_dir():
        sys.exit(f"gpu: {' '.join(missing)} cannot be imported, and there is no {WHEELS}: run `make gpu-wheels` on a machine with a network, and bring it")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade", "--find-links", str(WHEELS), "--target", str(SITE)]
    print("installing", *missing, "from", WHEELS, flush=True)
    subprocess.run([*pip, *missing], check=True)


def _found(name: str) -> bool:
    sys.path.append(str(SITE))
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False
    finally:
        sys.path.remove(str(SITE))


def run_all(todo: Sequence[Part], out: Path, minutes: float) -> list[str]:
    """Runs parts, each until its share of the time and that of those before it is over; how they ended."""
    begun, rows, share = time.perf_counter(), [], 0.0
    scale = 60 * minutes / sum(part.seconds for part in todo)
    for part in todo:
        share += part.seconds * scale
        left = begun + share - time.perf_counter()
        rows.append(f"{part.name:16} {run(part, out, left) if left > LEAST_SECONDS else 'left out: no time'}")
        log = out / f"{part.name}.log"
        shown = log.read_text(errors="replace").splitlines()[-SHOWN:] if log.exists() else []
        print(f"== {rows[-1]}", *shown, sep="\n", flush=True)
        (out / "summary.txt").write_text("\n".join([*rows, ""]))
    return rows


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--call", type=int, choices=(1, 2, 3, 4), help="the parts of this call (default: all)")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in parts("")], help="these parts alone")
    parser.add_argument("--minutes", type=float, help="for all parts together (default: 9, or 36 without --call)")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the emulator")
    args = parser.parse_args(words)
    args.out = args.out.resolve()
    args.minutes = args.minutes or (9 if args.call or args.only else 36)
    return args


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.dry_run:
        os.environ["CAFFELITE_CUDA_DRIVER"] = "emulator"
    install_missing()
    print("", *run_all(chosen(args), args.out, args.minutes), sep="\n")


if __name__ == "__main__":
    main()
