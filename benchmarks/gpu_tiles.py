"""Which tile and splits win for each product of a net, timed on this GPU, against what the formula of gemm_plan.py chooses.

    python benchmarks/gpu_tiles.py [--nets nin_crop48:128 alexnet:256] [--precisions bfloat16 tf32]

Trains a few steps with CAFFELITE_CUDA_TUNE=1, in a table of its own, and prints it: for each product the formula's choice, the fastest of those
tried by mma.sync and, where the GPU is a Hopper and the product is of bfloat16, by wgmma and by wgmma with TMA, how much longer the formula's takes
than the fastest of all, and mma.sync's fastest than the faster of the other two. The formula's choice is the first that is tried.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpu_step import net_and_batch
from nets import on_constants, write_solver

from caffelite import backends, environment
from caffelite.backends.cuda import gemm_tune
from caffelite.backends.cuda.gemm_plan import UNITS, Cut
from caffelite.schema import read_solver
from caffelite.solver.loop import Solver


class Watch(gemm_tune.Tuner):
    """A tuner that begins with an empty table, keeps it to itself, and remembers what the formula would have chosen."""

    folder: Path

    def __init__(self, driver: Any) -> None:
        super().__init__(driver)
        self.formula: dict[str, Cut] = {}

    @property
    def path(self) -> Path:
        return self.folder / "tiles.json"

    def pick(self, shape: str, cuts: Any, trial: Any) -> Cut:
        self.formula.setdefault(shape, cuts[0])
        return super().pick(shape, cuts, trial)


def tiles(net: str, batch: int, precision: str, folder: Path) -> list[str]:
    """The rows of a net's products."""
    backend = backends.get("cuda")
    watch = backend.tuner = Watch(backend.driver)  # type: ignore[attr-defined]
    watch.folder = folder
    watch.path.unlink(missing_ok=True)
    solver = Solver(read_solver(write_solver(folder, on_constants(net, batch), net)), backend=backend, precision=precision)
    try:
        solver.step(1)
    finally:
        solver.close()
    timed = json.loads(watch.path.read_text()) if watch.path.exists() else {}
    return [_row(f"{net}:{batch}", shape, gemm_tune._name(cut), timed.get(shape)) for shape, cut in watch.formula.items()]


def _row(net: str, shape: str, formula: str, entry: dict[str, Any] | None) -> str:
    if entry is None:
        return f"| {net} | {shape} | {formula} | | not timed |{' |' * 7}"
    microseconds = {name: 1e6 * seconds for name, seconds in entry["seconds"].items()}
    best: dict[str, tuple[float, str]] = {}
    for name, time in microseconds.items():
        unit, _, cut = (name if name[0].isalpha() else f"mma {name}").partition(" ")
        best[unit] = min(best.get(unit, (time, cut)), (time, cut))
    cells = [formula, f"{microseconds[formula]:.1f}"]
    for unit in UNITS:
        cells += [best[unit][1], f"{best[unit][0]:.1f}"] if unit in best else ["", ""]
    hopper = min((time for unit, (time, _) in best.items() if unit != "mma"), default=None)
    cells += [f"{microseconds[formula] / min(microseconds.values()):.2f}", f"{best['mma'][0] / hopper:.2f}" if hopper else ""]
    return f"| {net} | {shape} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", type=net_and_batch, default=[("nin_crop48", 128), ("alexnet", 256)], metavar="NET:BATCH")
    parser.add_argument("--precisions", nargs="+", choices=("bfloat16", "tf32"), default=["bfloat16", "tf32"])
    args = parser.parse_args()
    os.environ[environment.CUDA_TUNE] = "1"
    units = " | ".join(f"fastest {unit} | us" for unit in UNITS)
    print(f"| net | product | formula's | us | {units} | formula's / fastest | mma / fastest other |")
    print(f"|---|---|---|---:|{'---|---:|' * len(UNITS)}---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for precision in args.precisions:
            for net, batch in args.nets:
                print(*tiles(net, batch, precision, Path(folder)), sep="\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
