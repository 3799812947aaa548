"""The most that this machine's processors can multiply and add, whatever the library: what bounds every training step on them.

    python benchmarks/cpu_peak.py [--threads 2]

Compiles (gcc) a loop of 24 independent instructions on registers, 512 bits wide, and runs it on each thread: vfmadd231ps (16 multiply-adds in
float32) and, where the processor has it, vdpbf16ps (32 in bfloat16, summed in float32). Prints the median GFLOP/s of five runs, all threads
together. An idle machine, please. AMX tiles are not measured.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path

INSTRUCTIONS = {"float32": ("vfmadd231ps", 16, "avx512f"), "bfloat16": ("vdpbf16ps", 32, "avx512_bf16")}  # multiply-adds; flag of /proc/cpuinfo
REGISTERS, LOOPS, RUNS = 24, 20_000_000, 5


def source(name: str, instruction: str) -> str:
    """A C function that runs the loop `count` times."""
    clear = "".join(f"vpxord %%zmm{i},%%zmm{i},%%zmm{i}\\n" for i in range(32))
    body = "".join(f"{instruction} %%zmm30,%%zmm31,%%zmm{i}\\n" for i in range(REGISTERS))
    changed = ",".join(f'"zmm{i}"' for i in range(32))
    return f'void {name}(long count) {{ __asm__ volatile("{clear}1:\\n{body}dec %0\\njnz 1b" : "+r"(count) : : {changed}, "cc"); }}\n'


def build(folder: Path, names: list[str]) -> ctypes.CDLL:
    path = folder / "peak.c"
    path.write_text("".join(source(name, INSTRUCTIONS[name][0]) for name in names))
    subprocess.run(["gcc", "-O1", "-mavx512f", "-mavx512bf16", "-shared", "-fPIC", "-o", folder / "peak.so", path], check=True)
    return ctypes.CDLL(str(folder / "peak.so"))


def seconds(function: ctypes._CFuncPtr, threads: int) -> float:
    """Of the loop on every thread; ctypes lets go of Python's lock meanwhile."""
    workers = [threading.Thread(target=function, args=(ctypes.c_long(LOOPS),)) for _ in range(threads)]
    started = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    flags = Path("/proc/cpuinfo").read_text()
    names = [name for name, (_, _, flag) in INSTRUCTIONS.items() if f" {flag}" in flags]
    if not names:
        raise SystemExit("this processor has no AVX-512; the benchmark knows no other instructions")
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder), names)
        for name in names:
            flops = 2 * INSTRUCTIONS[name][1] * REGISTERS * LOOPS * args.threads
            rates = [flops / seconds(getattr(library, name), args.threads) / 1e9 for _ in range(RUNS)]
            print(f"{name}: {statistics.median(rates):.0f} GFLOP/s on {args.threads} threads ({min(rates):.0f} to {max(rates):.0f})")


if __name__ == "__main__":
    main()
