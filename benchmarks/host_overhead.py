"""What the host does for an iteration that a GPU plays back: Python's processor time, on a driver that launches nothing. Needs no GPU.

python benchmarks/host_overhead.py [--nets nin_crop48 alexnet] [--iterations 1000] [--rounds 5]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

from nets import NETS, on_constants, write_solver

from caffelite import backends
from caffelite.schema import read_solver
from caffelite.solver.loop import Solver


def microseconds(net: str, iterations: int, rounds: int) -> float:
    """Median over the rounds of the processor time of one iteration."""
    with tempfile.TemporaryDirectory() as folder:
        solver = Solver(read_solver(write_solver(Path(folder), on_constants(net, 128), net)), backend=backends.counting(), precision="bfloat16")
        solver.step(3)  # which records it
        seconds = []
        for _ in range(rounds):
            start = time.process_time()
            solver.step(iterations)
            seconds.append(time.process_time() - start)
    return median(seconds) / iterations * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["nin_crop48", "alexnet"])
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    for net in args.nets:
        print(f"{net:10} {microseconds(net, args.iterations, args.rounds):6.1f} us an iteration")


if __name__ == "__main__":
    main()
