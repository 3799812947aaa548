"""Says what machine this is, and compiles every kernel for it, several at once, so that what follows does not wait for the compiler.

    python benchmarks/gpu_prepare.py

Ends with status 1 where a kernel does not compile or the GPU is not found. Emulated, it compiles nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import metadata

from surroundings import ROOT

from caffelite import backends
from caffelite.backends.cuda.cupy_driver import compiled
from caffelite.backends.cuda.launch import Module
from caffelite.errors import BackendError

PACKAGES = (
    "numpy",
    "protobuf",
    "lmdb",
    "ml_dtypes",
    "pillow",
    "cupy-cuda13x",
    "cupy-cuda12x",
    "torch",
    "triton",
    "nvidia-cuda-nvrtc",
    "nvidia-cudnn-cu13",
    "pytest",
)


def packages() -> str:
    found = {name: _version(name) for name in PACKAGES}
    return ", ".join(f"{name} {version}" for name, version in found.items() if version)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def main() -> int:
    print(f"Python {platform.python_version()}, {os.cpu_count()} processors, {packages()}", flush=True)
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit", "--format=csv"], check=False)
    print("compute-sanitizer:", shutil.which("compute-sanitizer") or "missing", flush=True)
    try:
        driver = backends.get("cuda").driver  # type: ignore[attr-defined]
    except BackendError as error:
        print(error)
        return 1
    print(f"driver {driver.name}: {driver.facts() or 'no GPU'}", flush=True)
    if driver.name != "cupy":
        return 0
    modules = [module for module in runpy.run_path(str(ROOT / "tools" / "cuda_resources.py"))["modules"]() if module.only in ("", driver.architecture)]
    return compile_all(modules, driver.architecture, driver._cuda)


def compile_all(modules: Sequence[Module], architecture: str, cuda: int) -> int:
    """Compiles modules of kernels, or finds them compiled; 1 where one does not compile, else 0."""
    started = time.perf_counter()
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(modules)), multiprocessing.get_context("spawn")) as pool:  # threads would take turns
        said = [text for text in pool.map(partial(_compile, architecture, cuda), modules) if text]
    print(f"{len(modules) - len(said)} of {len(modules)} modules of kernels compiled in {time.perf_counter() - started:.1f} s", *said, sep="\n")
    return int(bool(said))


def _compile(architecture: str, cuda: int, module: Module) -> str:
    """What is wrong with a module; nothing where it compiles."""
    try:
        compiled(module, architecture, cuda)
    except BackendError as error:
        return f"{module.name}: {error}"
    return ""


if __name__ == "__main__":
    sys.exit(main())
