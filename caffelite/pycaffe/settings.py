"""What set_mode_cpu, set_mode_gpu and set_random_seed choose for the nets made after them."""

from __future__ import annotations

import os

from caffelite import backends
from caffelite.backends.contract import Backend
from caffelite.errors import BackendError
from caffelite.layer import known_types

TRAIN, TEST = 0, 1


class _Settings:
    """The choices in force."""

    def __init__(self) -> None:
        self.seed: int | None = None


settings = _Settings()


def set_mode_cpu() -> None:
    """Nets made from now on run on a CPU backend (CAFFELITE_BACKEND or the fastest that loads)."""


def set_mode_gpu() -> None:
    """BackendError: these classes show every blob as a numpy.ndarray and run on CPUs alone."""
    raise BackendError("pycaffe's nets do not run on a GPU yet", hint="use a CPU backend here; `caffelite train --gpu 0` trains on a GPU")


def set_device(device: int) -> None:
    """BackendError, as for set_mode_gpu."""
    set_mode_gpu()


def set_random_seed(seed: int) -> None:
    """Seeds fillers and random layers of the nets made from now on."""
    settings.seed = seed


def layer_type_list() -> list[str]:
    """All layer types by Caffe's names."""
    return known_types()


def new_backend() -> Backend:
    """The backend of the next net. BackendError where the environment asks for a GPU."""
    name = os.environ.get("CAFFELITE_BACKEND") or "auto"
    if name == "cuda":
        set_mode_gpu()
    return backends.get(name)


def new_seed() -> int:
    """The seed of the next net."""
    return int.from_bytes(os.urandom(4), "little") if settings.seed is None else settings.seed
