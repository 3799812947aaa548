"""The environment variables of caffelite's own: their names, and how their values are read. docs/running.md says what they do.

An empty variable counts as one that is not set. A value that means nothing is a SpecError that names the variable, the value and those allowed.
A name that is nearly a known one is most likely a slip (see `slips`); any other name may belong to somebody's own scripts, and nothing is said of it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from caffelite.errors import SpecError, did_you_mean, nearest

PREFIX = "CAFFELITE_"
BACKEND = "CAFFELITE_BACKEND"
CACHE = "CAFFELITE_CACHE"
CUDA_DRIVER = "CAFFELITE_CUDA_DRIVER"
CUDA_PRODUCTS = "CAFFELITE_CUDA_PRODUCTS"
CUDA_TUNE = "CAFFELITE_CUDA_TUNE"
DEBUG = "CAFFELITE_DEBUG"
DNNL = "CAFFELITE_DNNL"
EMULATOR = "CAFFELITE_EMULATOR"
EMULATOR_MEMORY = "CAFFELITE_EMULATOR_MEMORY"
EMULATOR_ORDER = "CAFFELITE_EMULATOR_ORDER"
NVRTC = "CAFFELITE_NVRTC"
WINOGRAD = "CAFFELITE_WINOGRAD"


def text(name: str) -> str | None:
    """The variable as it is; None where it is not set."""
    return os.environ.get(name) or None


def one_of(name: str, known: Sequence[str]) -> str | None:
    """One of the known words; None where the variable is not set."""
    value = text(name)
    if value is not None and value not in known:
        raise SpecError(f"{name} is '{value}' in the environment", hint=did_you_mean(value, known))
    return value


def choice(name: str, known: Sequence[str]) -> str:
    """One of the known words, the first where the variable is not set."""
    return one_of(name, known) or known[0]


def switch(name: str) -> bool:
    """Whether the variable is 1."""
    return choice(name, ("0", "1")) == "1"


def megabytes(name: str) -> int | None:
    """A number of megabytes of 2^20 as bytes; None where the variable is not set."""
    value = text(name)
    if value is None:
        return None
    if not re.fullmatch(r"\d+(\.\d+)?", value):
        raise SpecError(f"{name} is '{value}' in the environment", hint="give a number of megabytes, such as 512")
    return int(float(value) * 2**20)


KNOWN = frozenset(value for value in list(globals().values()) if isinstance(value, str) and re.fullmatch(PREFIX + "[A-Z_]+", value))  # those above


def slips() -> list[str]:
    """What to say of each variable that is set, unknown, and named much like a known one."""
    ends = [name.removeprefix(PREFIX) for name in KNOWN]
    told = []
    for name in sorted(os.environ):
        known = nearest(name.removeprefix(PREFIX), ends) if name.startswith(PREFIX) and name not in KNOWN and text(name) else None
        told += [f"{name} in the environment has no effect: did you mean {PREFIX}{known}?"] if known else []
    return told
