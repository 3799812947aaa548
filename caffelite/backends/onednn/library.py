"""Finds and loads libdnnl.so.3, and sets how many threads it uses."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from caffelite import environment
from caffelite.errors import BackendError

NAME = "libdnnl.so.3"
WHEEL = "onednn-cpu-gomp"
SPINS = "GOMP_SPINCOUNT"
INSTALL = f"install it with 'pip install {WHEEL}' (Linux, x86-64), or name a {NAME} in the environment variable {environment.DNNL}, or use --backend numpy"


class Version(ctypes.Structure):
    """The start of dnnl_version_t, which is all that is read."""

    _fields_ = (("major", ctypes.c_int), ("minor", ctypes.c_int), ("patch", ctypes.c_int))


def candidates() -> Iterator[str]:
    """Paths and names to try: the environment's choice alone if there is one, else the wheel's file, else the system's."""
    chosen = environment.text(environment.DNNL)
    if chosen:
        yield chosen
        return
    try:
        files = importlib.metadata.files(WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    yield from (str(file.locate()) for file in files if file.name == NAME)
    yield NAME


def load() -> ctypes.CDLL:
    """The library, loaded once for each choice. BackendError: none can be loaded, or it is not oneDNN 3."""
    tried: list[str] = []
    for path in candidates():
        library = _try(path, tried)
        if library is not None:
            return library
    raise BackendError(f"the oneDNN library {NAME} cannot be loaded ({'; '.join(tried)})", hint=INSTALL)


def _try(path: str, tried: list[str]) -> ctypes.CDLL | None:
    try:
        return _open(path)
    except OSError as error:
        tried.append(str(error))
        return None


@cache
def _open(path: str) -> ctypes.CDLL:
    with _short_spins():
        library = ctypes.CDLL(path)
    try:
        library.dnnl_version.restype = ctypes.POINTER(Version)
        found = library.dnnl_version().contents
    except AttributeError:
        raise BackendError(f"{path} is not a oneDNN library: it has no dnnl_version", hint=INSTALL) from None
    if found.major != 3:
        raise BackendError(f"{path} is oneDNN {found.major}.{found.minor}, version 3 is needed", hint=INSTALL)
    return library


@contextmanager
def _short_spins() -> Iterator[None]:
    """Lets idle OpenMP threads sleep soon, unless the environment says how they wait; libgomp reads it while it is loaded.

    By default they spin for milliseconds at the end of each op. When another program needs a processor, the thread that all
    wait for may be the one that was set aside, and every op takes a scheduler's time slice (8 ms instead of 0.1).
    """
    if "OMP_WAIT_POLICY" in os.environ or SPINS in os.environ:
        yield
        return
    os.environ[SPINS] = "2000"
    try:
        yield
    finally:
        del os.environ[SPINS]


def set_threads(count: int) -> None:
    """Makes this thread's oneDNN calls use `count` threads. BackendError where the OpenMP runtime cannot be found."""
    if count < 1:
        raise BackendError(f"the number of threads must be at least 1, found {count}")
    openmp().omp_set_num_threads(ctypes.c_int(count))


def thread_count() -> int:
    """How many threads oneDNN uses from this thread: OMP_NUM_THREADS, or the processors this process may run on."""
    return int(openmp().omp_get_max_threads())


@cache
def openmp() -> ctypes.CDLL:
    """The OpenMP runtime that the library runs on: already in the process once the library is loaded."""
    load()
    try:
        return ctypes.CDLL("libgomp.so.1")
    except OSError as error:
        raise BackendError(f"the OpenMP runtime libgomp.so.1 cannot be loaded ({error})", hint=INSTALL) from None
