"""How many threads NumPy's products take, where its BLAS is the OpenBLAS that NumPy's wheels bring. Another BLAS sees to that by itself.

A product that is cut in two has to wait for both halves. Where other programs keep the processors busy, that is at times for a time slice of the
scheduler, as with OpenMP's threads (onednn/library.py): beside three of them, on two processors, 50x1152 by 1152x20 took 1.7 to 3.4 ms in the mean on
two threads and 0.04 on one; undisturbed it takes 0.02 and 0.03.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np

Calls = tuple[Callable[[], int], Callable[[int], object]]


@cache
def calls() -> Calls | None:
    """OpenBLAS's functions that tell and that set the number of threads; None where there is another BLAS."""
    for path in sorted(Path(np.__file__).parent.parent.glob("numpy.libs/*openblas*")):
        try:
            library = ctypes.CDLL(str(path))  # which NumPy has loaded: it is not loaded again
        except OSError:
            continue
        for ending in ("64_", ""):
            tell, put = (getattr(library, f"scipy_openblas_{what}_num_threads{ending}", None) for what in ("get", "set"))
            if tell and put:
                return tell, put
    return None


@contextmanager
def one_thread() -> Iterator[None]:
    """Products in this block take one thread."""
    found = calls()
    before = found[0]() if found else 1
    if found is None or before == 1:
        yield
        return
    found[1](1)
    try:
        yield
    finally:
        found[1](before)
