"""How threads share the places of a channels-last activation: the host's side of kernels/channels.cuh."""

from __future__ import annotations

from caffelite.backends.contract import Array, Ints
from caffelite.backends.cuda.common import THREADS

MOST_IMAGES = 65535  # of a grid's second axis; the kernel's threads then loop


def vector_of(x: Array, *others: Array | None) -> int:
    """How many channels of x (N,C,H,W) a thread takes: 16 bytes of them, or one where they do not divide so or an array starts off their boundary."""
    vector = 16 // int(x.itemsize)
    fits = x.shape[1] % vector == 0 and all(a is None or a.address % min(16, vector * a.itemsize) == 0 for a in (x, *others))
    return vector if fits else 1


def tiles(x: Array, vector: int) -> tuple[Ints, Ints]:
    """Grid and block for one thread to every `vector` channels of a pixel of x."""
    images, channels, height, width = x.shape
    groups = max(1, min(channels // vector, THREADS))
    pixels = max(1, min(THREADS // groups, height * width))
    return (-(-height * width // pixels), min(images, MOST_IMAGES)), (groups, pixels)
