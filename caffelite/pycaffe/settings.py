"""What set_mode_cpu, set_mode_gpu, set_device and set_random_seed choose for the nets made after them."""

from __future__ import annotations

import os
import warnings
from functools import cache

from caffelite import backends, environment
from caffelite.backends.contract import Backend
from caffelite.layer import known_types

TRAIN, TEST = 0, 1


class _Settings:
    """The choices in force. gpu: None for what CAFFELITE_BACKEND says."""

    def __init__(self) -> None:
        self.seed: int | None = None
        self.gpu: bool | None = None
        self.device = 0


settings = _Settings()


def set_mode_cpu() -> None:
    """Nets made from now on run on a CPU backend (CAFFELITE_BACKEND or the fastest that loads)."""
    settings.gpu = False


def set_mode_gpu() -> None:
    """Nets made from now on run on the GPU that set_device chose, or the first one. BackendError when it does not start."""
    _gpu(settings.device)
    settings.gpu = True


def set_device(device: int) -> None:
    """The GPU for nets made from now on, by its number, once set_mode_gpu asks for one."""
    settings.device = device


@cache
def _gpu(device: int) -> Backend:
    """One backend for each GPU, with its compiled kernels."""
    return backends.get("cuda", device=device)


def set_random_seed(seed: int) -> None:
    """Seeds fillers and random layers of the nets made from now on."""
    settings.seed = seed


def layer_type_list() -> list[str]:
    """All layer types by Caffe's names."""
    return known_types()


def new_backend() -> Backend:
    """The backend of the next net. BackendError when it does not load, SpecError where CAFFELITE_BACKEND names none.

    Warns of variables whose names are nearly those of caffelite's own.
    """
    for slip in environment.slips():
        warnings.warn(slip, stacklevel=2)
    if settings.gpu:
        return _gpu(settings.device)
    name = environment.choice(environment.BACKEND, ("auto", *backends.NAMES))
    if settings.gpu is None and name == "cuda":
        return _gpu(settings.device)
    return backends.get("auto" if name == "cuda" else name)


def new_seed() -> int:
    """The seed of the next net."""
    return int.from_bytes(os.urandom(4), "little") if settings.seed is None else settings.seed
