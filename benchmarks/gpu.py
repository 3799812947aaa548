"""Everything to be known of a GPU in one run: the tests on it, the sanitizer's findings, and step times beside PyTorch's.

    python benchmarks/gpu.py OUT_FOLDER [--only tests sanitizer steps layers] [--minutes 9]

Each part writes OUT_FOLDER/<part>.log, whatever becomes of it, and the table at the end says how it ended. Parts that do not fit into
--minutes are cut off. Needs CuPy, pytest, and for `steps` PyTorch, all in the interpreter that runs this; compute-sanitizer is left
out where it is not installed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from train_step import ROOT, write_solver

OPS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_op_*.py"))
LAYERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_layer_*.py"))
NETS = (
    "golden_layers",
    "golden_training",
    "net",
    "net_random",
    "solver_resume",
    "cuda_gemm",
    "cuda_training",
    "cuda_repeat",
    "data_raw",
    "cuda_input",
    "solver_footprint",
    "pycaffe",
    "pycaffe_solvers",
    "pycaffe_mirror",
)
PYTEST = [sys.executable, "-m", "pytest", "-q", "--backend", "cuda"]


def parts(folder: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Name of the part, name of the log, command; the most important ones first."""
    yield "tests", "tests_ops", [*PYTEST, *OPS]
    yield "tests", "tests_nets", [*PYTEST, *LAYERS, *(f"tests/test_{name}.py" for name in NETS)]
    for net, batch in (("nin", 128), ("alexnet", 128)):
        steps = [sys.executable, "benchmarks/train_step.py", "--gpu", "0", "--nets", net, "--batch", str(batch), "--rounds", "3", "--iterations", "20"]
        yield "steps", f"steps_{net}_{batch}", steps
    for net in ("nin", "alexnet"):
        model = write_solver(folder, net, 128).with_name(f"{net}.prototxt")
        for precision in ("bfloat16", "float32"):
            command = [sys.executable, "-m", "caffelite", "time", "--model", str(model), "--gpu", "0", "--precision", precision, "--iterations", "20"]
            yield "layers", f"layers_{net}_{precision}", command
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer:
        for tool in ("memcheck", "racecheck"):
            yield "sanitizer", f"sanitizer_{tool}", [sanitizer, "--tool", tool, "--error-exitcode", "9", *PYTEST, "-x", *OPS]


def run(command: list[str], log: Path, seconds: float) -> str:
    """Runs a command with its output in a file; how it ended, in a few words."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "CAFFELITE_CUDA_DRIVER": os.environ.get("CAFFELITE_CUDA_DRIVER") or "cupy"}
    started = time.perf_counter()
    with log.open("w") as out:
        print("$", *command, file=out, flush=True)
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return f"cut off after {seconds:.0f} s"
    return f"exit status {done.returncode} after {time.perf_counter() - started:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the logs")
    parser.add_argument("--only", nargs="+", choices=("tests", "steps", "layers", "sanitizer"), help="these parts alone (default: all)")
    parser.add_argument("--minutes", type=float, default=9, help="time for all parts together (default: 9)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    end, rows = time.perf_counter() + 60 * args.minutes, []
    with tempfile.TemporaryDirectory() as folder:
        for part, name, command in parts(Path(folder)):
            left = end - time.perf_counter()
            if (not args.only or part in args.only) and left > 5:
                rows.append(f"{name:24} {run(command, args.out / f'{name}.log', left)}")
                print(rows[-1], flush=True)
    (args.out / "summary.txt").write_text("\n".join([*rows, ""]))


if __name__ == "__main__":
    main()
