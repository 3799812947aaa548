"""Compiles CUDA C++ to machine code (CUBIN) with NVRTC, NVIDIA's compiler library, through ctypes. Needs neither a GPU nor a driver.

The library comes with the extras cuda12 and cuda13 (nvidia-cuda-nvrtc), or a CUDA toolkit; CAFFELITE_NVRTC names one outright.
`newest` is the greatest major version that may be used: a driver loads no code of a CUDA newer than its own.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from caffelite import environment
from caffelite.errors import BackendError

HINT = "in a clone of caffelite: pip install '.[cuda13]' (or [cuda12], for a driver of CUDA 12); or name libnvrtc.so in CAFFELITE_NVRTC"
ANY = 1 << 30


def compile_cubin(
    text: str, file: str, architecture: str, names: Sequence[str], options: Sequence[str] = (), *, newest: int = ANY
) -> tuple[bytes, dict[str, str], str]:
    """Machine code of `text` for an architecture such as "sm_90a", the symbol of each name expression, and the compiler's log.

    file: the name that messages give. BackendError with the log when it does not compile.
    """
    library, program = _library(newest), ctypes.c_void_p()
    _check(library, library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), file.encode(), 0, None, None))
    try:
        for name in names:
            _check(library, library.nvrtcAddNameExpression(program, name.encode()))
        flags = [f"--gpu-architecture={architecture}", "-std=c++17", "-default-device", *options]
        status = library.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags)))
        log = _bytes(library, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if status:
            unknown = "--gpu-architecture" in log
            raise BackendError(f"{file} does not compile for {architecture}:\n{log.strip()}", hint=_newer(newest) if unknown else None)
        return _bytes(library, program, "CUBIN"), {name: _symbol(library, program, name) for name in names}, log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def version(newest: int = ANY) -> tuple[int, int]:
    """NVRTC's version, as (13, 0). BackendError where there is none."""
    library, major, minor = _library(newest), ctypes.c_int(), ctypes.c_int()
    _check(library, library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def _newer(newest: int) -> str:
    major, minor = version(newest)
    return f"NVRTC {major}.{minor} does not know that GPU: update nvidia-cuda-nvrtc, or name a newer libnvrtc.so in CAFFELITE_NVRTC"


@functools.cache
def _library(newest: int) -> Any:
    given = environment.text(environment.NVRTC)
    errors = []
    for path in [given] if given else _candidates(newest):
        try:
            for builtins in Path(path).parent.glob("libnvrtc-builtins.so.*"):  # looked up by its bare name later on
                ctypes.CDLL(str(builtins))
            library = ctypes.CDLL(path)
            library.nvrtcGetErrorString.restype = ctypes.c_char_p
        except (OSError, AttributeError) as error:  # AttributeError: some other library
            errors.append(str(error))
            continue
        return library
    raise BackendError(f"NVRTC, the CUDA compiler library, does not load: {'; '.join(errors) or 'it was not found'}", hint=HINT)


def _candidates(newest: int) -> list[str]:
    """Libraries of installed wheels and toolkits, newest CUDA first, then what the system's loader finds."""
    found = [str(path) for folder in sys.path for path in Path(folder or ".").glob("nvidia/*/lib/libnvrtc.so.*")]
    found += [str(path) for path in sorted(Path("/usr/local").glob("cuda*/lib64/libnvrtc.so.*"), reverse=True)]
    system = ctypes.util.find_library("nvrtc")
    fitting = [path for path in found if _major(path) <= newest]
    return sorted(fitting, key=_major, reverse=True) + ([system] if system else [])


def _major(path: str) -> int:
    return int(path.split(".so.")[1].split(".")[0])


def _bytes(library: Any, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(library, getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _symbol(library: Any, program: ctypes.c_void_p, name: str) -> str:
    symbol = ctypes.c_char_p()
    _check(library, library.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(symbol)))
    return (symbol.value or b"").decode()


def _check(library: Any, status: int) -> None:
    if status:
        raise BackendError(f"NVRTC: {library.nvrtcGetErrorString(status).decode()}")
