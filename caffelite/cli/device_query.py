"""caffelite device-query: the processor, the backends that load and why others do not, GPUs, library versions."""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffelite import __version__
from caffelite.cli.common import PRECISIONS, Parser, json_text
from caffelite.errors import BackendError, CaffeliteError, SpecError
from caffelite.machine import processors

if TYPE_CHECKING:
    from caffelite.backends.contract import Backend

ISA_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")
PACKAGES = ("numpy", "protobuf", "pillow", "lmdb", "ml_dtypes", "onednn-cpu-gomp", "matplotlib", "h5py", "cupy-cuda12x", "cupy-cuda13x")
BACKENDS = ("onednn", "numpy", "cuda")


def build_parser(prog: str) -> Parser:
    parser = Parser(prog, "Shows the processor, the backends that load (and why others do not), GPUs and library versions.", f"{prog} --json")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--gpu", metavar="ID", help="show only these GPUs: a number, several with commas, or all (default)")
    return parser


def run(args: argparse.Namespace) -> int:
    facts = {
        "caffelite": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_facts(),
        "backends": {name: backend_facts(name) for name in BACKENDS},
        "gpu": gpu_facts(args.gpu),
        "packages": package_versions(),
    }
    print(json_text(facts) if args.json else "\n".join(_lines(facts)))
    return 0


def cpu_facts() -> dict[str, Any]:
    """Model, cores of the machine and of this process, memory in bytes, and the instruction sets that matter here."""
    model, flags = platform.processor() or platform.machine(), set[str]()
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = [line.partition(":") for line in info.read_text(encoding="utf-8", errors="replace").splitlines()]
        model = next((value.strip() for key, _, value in fields if key.strip() == "model name"), model)
        flags = {flag for key, _, value in fields if key.strip() in ("flags", "Features") for flag in value.split()}
    return {
        "model": model,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": processors(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
    }


def backend_facts(name: str) -> dict[str, Any]:
    """Whether a backend loads, why not, and how it runs each precision: "fast", or a sentence."""
    from caffelite import backends

    try:
        backend = backends.get(name)
    except CaffeliteError as error:
        return {"loads": False, "why": str(error)}
    return {"loads": True, "precisions": {precision: _speed(backend, precision) for precision in PRECISIONS}}


def _speed(backend: Backend, precision: str) -> str:
    try:
        return backend.supports(precision) or "fast"
    except BackendError as error:
        return f"not available: {error.message}"


def gpu_facts(chosen: str | None) -> dict[str, Any]:
    """GPUs as CuPy sees them, or why there are none to see. SpecError for a GPU number that does not exist."""
    try:
        import cupy
    except ImportError:
        return {"devices": [], "why": "CuPy, which would show them, is not installed"}
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CuPy raises its own types, and OSError for a missing driver
        return {"devices": [], "why": f"CuPy finds no usable GPU: {error}"}
    return {"devices": [_gpu(cupy, index) for index in _chosen(chosen, count)], "why": None if count else "CuPy finds none"}


def _chosen(chosen: str | None, count: int) -> list[int]:
    if chosen in (None, "", "all"):
        return list(range(count))
    numbers = [part.strip() for part in str(chosen).split(",")]
    for part in numbers:
        if not part.isdigit() or int(part) >= count:
            raise SpecError(f"--gpu {chosen}: there is no GPU '{part}'", hint=f"{count} GPU(s) found, numbered from 0")
    return [int(part) for part in numbers]


def _gpu(cupy: Any, index: int) -> dict[str, Any]:
    facts = cupy.cuda.runtime.getDeviceProperties(index)
    return {
        "id": index,
        "name": facts["name"].decode(),
        "compute_capability": f"{facts['major']}.{facts['minor']}",
        "memory_bytes": facts["totalGlobalMem"],
        "multiprocessors": facts["multiProcessorCount"],
    }


def package_versions() -> dict[str, str | None]:
    """Installed versions of the libraries caffelite uses; None where one is missing."""
    from importlib.metadata import distributions

    installed = {dist.metadata["Name"].lower(): dist.version for dist in distributions() if dist.metadata["Name"]}
    return {name: installed.get(name) for name in PACKAGES}


def _lines(facts: dict[str, Any]) -> list[str]:
    cpu, gpu = facts["cpu"], facts["gpu"]
    lines = [f"caffelite {facts['caffelite']}, Python {facts['python']}, {facts['system']}", ""]
    memory = f", {cpu['memory_bytes'] / 2**30:.1f} GB memory" if cpu["memory_bytes"] else ""
    lines += [f"CPU       {cpu['model']} ({cpu['machine']})", f"          {cpu['usable_cores']} of {cpu['cores']} cores usable{memory}"]
    lines += [f"          {' '.join(cpu['isa']) or 'no vector extensions known to caffelite'}", ""]
    for name, backend in facts["backends"].items():
        if backend["loads"]:
            lines += [f"{name:9} loads"] + [f"          {precision}: {how}" for precision, how in backend["precisions"].items()]
        else:
            lines.append(f"{name:9} does not load: " + backend["why"].replace("\n", "\n          "))
    lines.append("")
    lines += [f"GPU {d['id']}     {d['name']}, compute capability {d['compute_capability']}, {d['memory_bytes'] / 2**30:.1f} GB" for d in gpu["devices"]]
    lines += [*([f"GPU       none: {gpu['why']}"] if gpu["why"] else []), ""]
    lines += [f"{name:16} {version or 'not installed'}" for name, version in facts["packages"].items()]
    return lines
