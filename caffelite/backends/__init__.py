"""Backends: one folder for each kind of machine, all implementing backends/contract.py."""

from __future__ import annotations

from caffelite import environment
from caffelite.backends.contract import Backend
from caffelite.errors import BackendError

NAMES = ("numpy", "onednn", "cuda")


def get(name: str = "auto", threads: int | None = None, device: int = 0) -> Backend:
    """The backend of that name: "numpy", "onednn", "cuda", or "auto" for the fastest CPU backend that loads here.

    threads: how many CPU threads it may use; None leaves the choice to the environment and the machine. device: the GPU's number, for "cuda".
    BackendError: the name is unknown, its library cannot be loaded (for "auto": one that CAFFELITE_DNNL names), there is no such GPU, or threads is
    less than 1.
    """
    if name == "auto":
        try:
            return _onednn(threads)
        except BackendError:
            if environment.text(environment.DNNL):  # a library that was asked for is not done without in silence
                raise
            return _numpy(threads)
    if name == "onednn":
        return _onednn(threads)
    if name == "numpy":
        return _numpy(threads)
    if name == "cuda":
        return _cuda(device)
    raise BackendError(f"unknown backend '{name}'", hint=f"known ones: auto, {', '.join(NAMES)}")


def counting() -> Backend:
    """The cuda backend without a GPU, of which nothing runs: its peak_bytes() are those that a run on a GPU would need."""
    from caffelite.backends.cuda.counting import CountingBackend

    return CountingBackend()


def _numpy(threads: int | None) -> Backend:
    from caffelite.backends.numpy import NumpyBackend

    return NumpyBackend(threads)


def _onednn(threads: int | None) -> Backend:
    from caffelite.backends.onednn import OneDNNBackend

    return OneDNNBackend(threads)


def _cuda(device: int) -> Backend:
    from caffelite.backends.cuda import CudaBackend

    return CudaBackend(device)
