"""How threads share the places of a channels-last activation: the host's side of kernels/channels.cuh."""

from __future__ import annotations

from caffelite.backends.contract import Array, Ints
from caffelite.backends.cuda.common import THREADS

MOST_IMAGES = 65535  # of a grid's second axis; the kernel's threads then loop


def vector_of(x: Array) -> int:
    """How many channels of x (N,C,H,W) a thread takes: 16 bytes of them, or one where they do not divide so."""
    vector = 16 // int(x.itemsize)
    return vector if x.shape[1] % vector == 0 else 1


def tiles(x: Array, vector: int) -> tuple[Ints, Ints]:
    """Grid and block for one thread to every `vector` channels of a pixel of x."""
    images, channels, height, width = x.shape
    groups = max(1, min(channels // vector, THREADS))
    pixels = max(1, min(THREADS // groups, height * width))
    return (-(-height * width // pixels), min(images, MOST_IMAGES)), (groups, pixels)
