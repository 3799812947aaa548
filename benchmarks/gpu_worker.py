"""Trains one net in one engine and times it when asked; gpu_step.py starts it, one process an engine and mode.

    python benchmarks/gpu_worker.py --engine caffelite --net nin_crop48 --batch 128 --precision bfloat16

It imports what it needs. At the first line of its input it starts, warms up, and prints `result {...}`: nothing runs on the device before. Then,
for each line, a number of seconds, it takes about as many steps as fit into them and prints `result {"step_ms": ..., "peak_mb": ...}`. It ends
with its input. Times are those of the device between an event before the first step and one after the last; a step is forward, loss, backward and
update, on an input that is on the device already.

caffelite runs as in training: recorded iterations, played back. PyTorch is channels_last, with cudnn.benchmark and a fused SGD; tf32: in all products;
bfloat16: autocast; --compile: torch.compile, max-autotune. peak_mb: the most memory that arrays took at once, in 2^20 bytes; PyTorch's begins with
its second step, for in the first one it tries kernels, in memory that it does not need later; peak_mb_first has that too. reserved_mb: what
PyTorch held for itself. Where the device is a CPU (--device cpu, or caffelite's emulator), times say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WARM_UP = 5  # steps after the first
MOST_STEPS = 2000


class Ours:
    """caffelite, on GPU 0 or emulated."""

    def __init__(self, args: argparse.Namespace) -> None:
        from nets import on_constants, write_solver

        from caffelite import backends
        from caffelite.schema import read_solver
        from caffelite.solver.loop import Solver

        self._backend = backends.get("cuda")
        with tempfile.TemporaryDirectory() as folder:
            spec = read_solver(write_solver(Path(folder), on_constants(args.net, args.batch), args.net))
            self._solver = Solver(spec, backend=self._backend, precision=args.precision)

    def seconds(self, steps: int) -> float:
        start = self._backend.mark()
        self._solver.step(steps)
        return self._backend.seconds_between(start, self._backend.mark())

    def memory(self) -> dict[str, float]:
        return {"peak_mb": (self._backend.peak_bytes() or 0) / 2**20}


class Torch:
    """PyTorch on the first GPU that it sees, or on the CPU."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        from nets import NETS
        from torch_nets import MAKERS, optimizer

        torch.manual_seed(0)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.precision == "tf32"
        self._torch, self._on_gpu = torch, args.device == "cuda"
        images = NETS[args.net]
        net = MAKERS[args.net](images.classes).to(args.device, memory_format=torch.channels_last).train()
        loss_of, low = torch.nn.CrossEntropyLoss(), args.precision == "bfloat16"

        def forward(x: Any, labels: Any) -> Any:
            with torch.autocast(args.device, torch.bfloat16, enabled=low):
                return loss_of(net(x), labels)

        self._forward = torch.compile(forward, mode="max-autotune") if args.compile else forward
        x = torch.randn(args.batch, images.channels, images.size, images.size)
        self._x = x.to(args.device, memory_format=torch.channels_last)
        self._labels = torch.randint(images.classes, (args.batch,)).to(args.device)
        self._sgd = optimizer(net, 1e-6, fused=self._on_gpu)
        self._first_peak: float | None = None

    def seconds(self, steps: int) -> float:
        cuda = self._torch.cuda
        if not self._on_gpu:
            started = time.perf_counter()
            self._steps(steps)
            return time.perf_counter() - started
        start, stop = (cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._steps(steps)
        stop.record()
        stop.synchronize()
        if self._first_peak is None:
            self._first_peak = cuda.max_memory_allocated() / 2**20
            cuda.reset_peak_memory_stats()
        return float(start.elapsed_time(stop)) / 1e3

    def _steps(self, steps: int) -> None:
        for _ in range(steps):
            loss = self._forward(self._x, self._labels)
            self._sgd.zero_grad(set_to_none=True)
            loss.backward()
            self._sgd.step()

    def memory(self) -> dict[str, Any]:
        cuda, facts = self._torch.cuda, {"torch": self._torch.__version__}
        if not self._on_gpu:
            return facts
        peaks = {"peak_mb": cuda.max_memory_allocated() / 2**20, "reserved_mb": cuda.max_memory_reserved() / 2**20}
        return {**facts, **peaks, "peak_mb_first": self._first_peak, "device": cuda.get_device_name(), "cudnn": self._torch.backends.cudnn.version()}


ENGINES = {"caffelite": Ours, "torch": Torch}


def say(values: dict[str, Any]) -> None:
    print("result", json.dumps(values), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--net", required=True, help="a folder of models/")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--precision", choices=("float32", "tf32", "bfloat16"), required=True)
    parser.add_argument("--compile", action="store_true", help="torch.compile, max-autotune")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="PyTorch's (default: cuda)")
    args = parser.parse_args()
    importlib.import_module("torch" if args.engine == "torch" else "caffelite.solver.loop")
    sys.stdin.readline()
    started = time.perf_counter()
    engine = ENGINES[args.engine](args)
    engine.seconds(1)
    first, step = time.perf_counter() - started, engine.seconds(WARM_UP) / WARM_UP
    say({"first_s": first})
    for line in sys.stdin:
        steps = max(1, min(MOST_STEPS, round(float(line) / step)))
        step = engine.seconds(steps) / steps
        say({"step_ms": step * 1e3, "steps": steps, **engine.memory()})


if __name__ == "__main__":
    main()
