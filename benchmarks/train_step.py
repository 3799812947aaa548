"""Times whole training steps of caffelite and of PyTorch, on the CPU or a GPU, in turn, and prints one table.

    python benchmarks/train_step.py                                  # NIN (48x48, 200 classes) and AlexNet (227x227), batch 32
    python benchmarks/train_step.py --memory                         # NIN at batch 100: peak memory
    python benchmarks/train_step.py --gpu 0 --batch 128              # on a GPU: PyTorch eager and compiled
    python benchmarks/train_step.py --torch-python ~/torch/bin/python

Every figure comes from a process of its own that sees the same number of threads. Rounds go through all candidates one after
another, so that whatever else the machine does falls on all alike; the table holds medians over the rounds. Both sides run
forward, backward and update on an input that lies in memory, filled once; what the numbers are does not change the work. The
rate of learning is tiny, so that the loss stays where it is. The nets are models/nin_crop48 and models/alexnet, read from
there, with their data layers replaced; torch_nets.py has the same layers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from caffelite.schema import pb, read_net, to_text

ROOT = Path(__file__).resolve().parent.parent
NETS = {"nin": ("nin_crop48", 48), "alexnet": ("alexnet", 227)}  # model folder, image size
TORCH_MODES = ("contiguous", "channels_last", "bfloat16", "bfloat16_contiguous")
TORCH_GPU_MODES = ("channels_last", "tf32", "bfloat16")  # each eager and compiled
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


def write_solver(folder: Path, net_name: str, batch: int) -> Path:
    """The shipped training net with DummyData in place of its Data layers, and a solver for it; returns the solver's path."""
    model, size = NETS[net_name]
    net = read_net(ROOT / "models" / model / "train_val.prototxt").param
    layers = [layer for layer in net.layer if layer.type != "Data"]
    data = pb.LayerParameter(name="data", type="DummyData", top=["data", "label"])
    for value, dims in ((0.5, (batch, 3, size, size)), (1, (batch,))):
        data.dummy_data_param.shape.add().dim.extend(dims)
        data.dummy_data_param.data_filler.add(type="constant", value=value)
    del net.layer[:]
    net.layer.extend([data, *layers])
    net_path, solver_path = folder / f"{net_name}.prototxt", folder / f"{net_name}_solver.prototxt"
    net_path.write_text(to_text(net))
    solver = pb.SolverParameter(net=str(net_path), base_lr=1e-6, lr_policy="fixed", momentum=0.9, weight_decay=0.0005, max_iter=10**6)
    solver.snapshot_prefix, solver.random_seed, solver.snapshot_after_train = str(folder / net_name), 1, False
    solver.solver_mode = pb.SolverParameter.CPU
    solver_path.write_text(to_text(solver))
    return solver_path


def candidates(args: argparse.Namespace, folder: Path) -> Iterator[Candidate]:
    """Every row, in the order in which a round runs them."""
    count = str(args.iterations)
    for net in args.nets:
        solver = write_solver(folder, net, args.batch)
        for precision in PRECISIONS:
            flags = ["--precision", precision, "--iterations", count, "--json", *(["--gpu", args.gpu] if args.gpu else [])]
            yield Candidate(net, "caffelite", precision, [sys.executable, "-m", "caffelite", "time", "--solver", str(solver), *flags])
        script = str(ROOT / "benchmarks" / "torch_step.py")
        for mode, extra in torch_modes(args):
            flags = ["--net", net, "--mode", mode, "--batch", str(args.batch), "--iterations", count, *extra]
            yield Candidate(net, "PyTorch", " ".join([mode, *(["compiled"] if "--compile" in extra else [])]), [args.torch_python, script, *flags])


def torch_modes(args: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """PyTorch's modes, each with the flags that torch_step.py needs besides."""
    if not args.gpu:
        return [(mode, []) for mode in TORCH_MODES]
    return [(mode, ["--device", "cuda", *extra]) for mode in TORCH_GPU_MODES for extra in ([], ["--compile"])]


def measure(candidate: Candidate, threads: int) -> None:
    """Runs a candidate once in a process of its own and keeps its figures."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    done = subprocess.run(candidate.command, env=environment, stdout=subprocess.PIPE, check=False)
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
        best32 = max(other.middle("images_per_s") for other in rivals if not other.mode.startswith(("bfloat16", "tf32")))
        rate = row.middle("images_per_s")
        cells = [row.net, row.engine, row.mode, f"{rate:.1f}", f"{row.middle('step_ms'):.1f}", f"{row.middle('peak_rss_mb'):.0f}"]
        lines.append(f"| {' | '.join([*cells, f'{rate / best32:.2f}', f'{rate / best:.2f}'])} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--batch", type=int, help="images a step (default: 32; 100 with --memory)")
    parser.add_argument("--iterations", type=int, default=10, help="timed steps a round (default: 10)")
    parser.add_argument("--gpu", metavar="ID", help="run on this GPU; PyTorch runs on the first that it sees")
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
