"""Times whole training steps of caffelite and of PyTorch on the CPU, in turn, and prints one table.

    python benchmarks/train_step.py                                  # NIN (48x48, 200 classes) and AlexNet (227x227), batch 32
    python benchmarks/train_step.py --memory                         # NIN at batch 100: peak memory
    python benchmarks/train_step.py --torch-python ~/torch/bin/python

Every figure comes from a process of its own that sees the same number of threads. Rounds go through all candidates one after
another, so that whatever else the machine does falls on all alike; the table holds medians over the rounds. Both sides run
forward, backward and update on an input that lies in memory, filled once; what the numbers are does not change the work. The
rate of learning is tiny, so that the loss stays where it is. The nets are models/nin_crop48 and models/alexnet, read from
there, with their data layers replaced; torch_nets.py has the same layers. gpu_step.py
does this on a GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from nets import on_constants, write_solver
from surroundings import ROOT, environment

NETS = {"nin": "nin_crop48", "alexnet": "alexnet"}  # model folders
TORCH_MODES = ("contiguous", "channels_last", "bfloat16", "bfloat16_contiguous")
PRECISIONS = ("float32", "bfloat16")


@dataclass
class Candidate:
    """One row of the table: what to run, and what each round gave."""

    net: str
    engine: str
    mode: str
    command: list[str]
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def middle(self, key: str) -> float:
        return median(result[key] for result in self.rounds)


def candidates(args: argparse.Namespace, folder: Path) -> Iterator[Candidate]:
    """Every row, in the order in which a round runs them."""
    count = str(args.iterations)
    for net in args.nets:
        solver = write_solver(folder, on_constants(NETS[net], args.batch), net)
        for precision in PRECISIONS:
            flags = ["--precision", precision, "--iterations", count, "--json"]
            yield Candidate(net, "caffelite", precision, [sys.executable, "-m", "caffelite", "time", "--solver", str(solver), *flags])
        script = str(ROOT / "benchmarks" / "torch_step.py")
        for mode in TORCH_MODES:
            flags = ["--net", net, "--mode", mode, "--batch", str(args.batch), "--iterations", count]
            yield Candidate(net, "PyTorch", mode, [args.torch_python, script, *flags])


def measure(candidate: Candidate, threads: int) -> None:
    """Runs a candidate once in a process of its own and keeps its figures."""
    around = environment(OMP_NUM_THREADS=str(threads))
    done = subprocess.run(candidate.command, env=around, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.exit(f"train_step: {candidate.engine} {candidate.mode} failed (exit status {done.returncode}): {' '.join(candidate.command)}")
    candidate.rounds.append(json.loads(done.stdout))


def processor() -> str:
    """The processor's name, and whether it multiplies bfloat16 matrices in hardware."""
    name, flags = platform.processor() or platform.machine(), ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            name = value.strip() if key.strip() == "model name" else name
            flags = value if key.strip() == "flags" else flags
    except OSError:
        pass
    special = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags.split()]
    return f"{name} ({', '.join(special) or 'no bfloat16 instructions'})"


def table(rows: list[Candidate]) -> str:
    """Markdown. The ratios are images a second against PyTorch's best in float32 and in any mode."""
    lines = [
        "| net | engine | mode | images/s | step ms | peak RSS MB | x PyTorch's best float32 | x PyTorch's best |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        rivals = [other for other in rows if other.net == row.net and other.engine == "PyTorch"]
        best = max(other.middle("images_per_s") for other in rivals)
        best32 = max(other.middle("images_per_s") for other in rivals if not other.mode.startswith("bfloat16"))
        rate = row.middle("images_per_s")
        cells = [row.net, row.engine, row.mode, f"{rate:.1f}", f"{row.middle('step_ms'):.1f}", f"{row.middle('peak_rss_mb'):.0f}"]
        lines.append(f"| {' | '.join([*cells, f'{rate / best32:.2f}', f'{rate / best:.2f}'])} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--batch", type=int, help="images a step (default: 32; 100 with --memory)")
    parser.add_argument("--iterations", type=int, default=10, help="timed steps a round (default: 10)")
    parser.add_argument("--rounds", type=int, default=5, help="times that each candidate runs (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="OMP_NUM_THREADS of every process (default: 2)")
    parser.add_argument("--torch-python", default=sys.executable, metavar="PYTHON", help="an interpreter with PyTorch (default: this one)")
    parser.add_argument("--memory", action="store_true", help="NIN alone, at batch 100, one round: for the column of peak memory")
    args = parser.parse_args()
    if args.memory:
        args.nets, args.rounds = ["nin"], 1
    args.batch = args.batch or (100 if args.memory else 32)
    return args


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        rows = list(candidates(args, Path(folder)))
        for number in range(1, args.rounds + 1):
            for row in rows:
                measure(row, args.threads)
                print(f"round {number}: {row.net} {row.engine} {row.mode} {row.rounds[-1]['images_per_s']:.1f} images/s", file=sys.stderr)
    torch = next(row for row in rows if row.engine == "PyTorch").rounds[0]["torch"]
    print(f"{processor()}, {args.threads} threads, batch {args.batch}, PyTorch {torch}, medians of {args.rounds} rounds of {args.iterations} steps\n")
    print(table(rows))


if __name__ == "__main__":
    main()
