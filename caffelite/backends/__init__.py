"""Backends: one folder for each kind of machine, all implementing backends/contract.py."""

from __future__ import annotations

from caffelite.backends.contract import Backend
from caffelite.errors import BackendError

NAMES = ("numpy", "onednn")


def get(name: str = "auto", threads: int | None = None) -> Backend:
    """The backend of that name: "numpy", "onednn", or "auto" for the fastest that loads here.

    threads: how many CPU threads it may use; None leaves the choice to the environment and the machine.
    BackendError: the name is unknown, its library cannot be loaded, or threads is less than 1.
    """
    if name == "auto":
        try:
            return _onednn(threads)
        except BackendError:
            return _numpy(threads)
    if name == "onednn":
        return _onednn(threads)
    if name == "numpy":
        return _numpy(threads)
    if name in ("cuda", "gpu"):
        raise BackendError("this version of caffelite has no CUDA support", hint=f"known backends: auto, {', '.join(NAMES)}")
    raise BackendError(f"unknown backend '{name}'", hint=f"known ones: auto, {', '.join(NAMES)}")


def _numpy(threads: int | None) -> Backend:
    from caffelite.backends.numpy import NumpyBackend

    return NumpyBackend(threads)


def _onednn(threads: int | None) -> Backend:
    from caffelite.backends.onednn import OneDNNBackend

    return OneDNNBackend(threads)
