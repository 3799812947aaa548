"""Writes tests/data/cuda-resources.csv: registers, shared and local memory of every CUDA kernel, as the compiler reports them.

    python tools/cuda_resources.py

Needs NVRTC, no GPU. Run it after changing a kernel, and look at what moved: the test of the same table fails until it agrees.
"""

from __future__ import annotations

import csv
import importlib
import json
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from caffelite.backends import cuda
from caffelite.backends.cuda import cache, nvrtc
from caffelite.backends.cuda.launch import FOLDER, Module, digest
from caffelite.errors import BackendError

TABLE = Path(__file__).resolve().parent.parent / "tests" / "data" / "cuda-resources.csv"
ARCHITECTURES = ("sm_80", "sm_90a")
SERIALIZED = re.compile(r"\(C75\d\d\)|wgmma.* serialized")  # what the assembler says of products that do not overlap


class Resources(NamedTuple):
    """What one kernel takes on one architecture. registers: of a thread; the rest in bytes; spills: stored and loaded."""

    module: str
    kernel: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spills: int


def modules() -> Iterator[Module]:
    """Every module of kernels that the backend's files name, alone or in a tuple, once."""
    found: dict[str, Module] = {}
    for info in pkgutil.iter_modules(cuda.__path__):
        if not info.ispkg and info.name != "cupy_driver":
            file = importlib.import_module(f"{cuda.__name__}.{info.name}")
            for value in vars(file).values():
                found |= {module.name: module for module in (value if isinstance(value, tuple) else (value,)) if isinstance(module, Module)}
    yield from found.values()


def architectures(module: Module) -> tuple[str, ...]:
    """Those that a module is compiled for."""
    return (module.only,) if module.only else ARCHITECTURES


def measure(module: Module, architecture: str) -> list[Resources]:
    """The kernels of a module in their own order, compiled unless the same text was before. BackendError when it does not compile, or only
    with products by wgmma that wait for one another."""
    key = digest(*module.sources(), Path(__file__), Path(nvrtc.__file__), module.names, nvrtc.version())
    kept = cache.folder("resources") / f"{module.name}-{architecture}-{key}.json"
    cache.once(kept, lambda out: out.write_text(json.dumps(_compiled(module, architecture))))
    return [Resources(module.name, name, architecture, *numbers) for name, numbers in json.loads(cache.content(kept) or b"{}").items()]


def _compiled(module: Module, architecture: str) -> dict[str, tuple[int, int, int, int]]:
    """Registers, shared memory, stack and spills of each kernel, as the compiler says now."""
    options = [f"-I{FOLDER}", "--ptxas-options=-v"]
    _, symbols, log = nvrtc.compile_cubin(module.path.read_text(), str(module.path), architecture, module.names, options)
    slow = [line for line in log.split("\n") if SERIALIZED.search(line)]
    if slow:
        told = "\n".join([f"{module.name}: the assembler puts wgmma one after another:", *slow])
        raise BackendError(told, hint="leave accumulators alone between wgmma and wait")
    reports = dict(_reports(log))
    return {name: reports[symbols[name]] for name in module.names}


def _reports(log: str) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
    """Symbol and (registers, shared, stack, spills) of each kernel in the assembler's log."""
    for part in log.split("Compiling entry function '")[1:]:
        stack, stores, loads = (int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", part)[:3])
        registers, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
        assert registers, part
        yield part.split("'")[0], (int(registers[1]), int(shared[1]) if shared else 0, stack, stores + loads)


def read() -> list[Resources]:
    """The committed table."""
    with TABLE.open(newline="") as file:
        return [Resources(*row[:3], *map(int, row[3:])) for row in list(csv.reader(file))[1:]]


def main() -> None:
    rows = [row for module in modules() for architecture in architectures(module) for row in measure(module, architecture)]
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Resources._fields)
        writer.writerows(rows)
    bad = [row for row in rows if row.spills or row.stack]
    print(f"{TABLE}: {len(rows)} rows, {len(bad)} with spills or local memory", *bad, sep="\n")


if __name__ == "__main__":
    main()
