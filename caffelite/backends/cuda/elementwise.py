"""Passes over flat arrays: the host's side of kernels/elementwise.cuh."""

from __future__ import annotations

from caffelite.backends.contract import Array


def vectors(x: Array) -> int:
    """How many pieces of 16 bytes x has: one to a thread in a pass over x."""
    return -(-int(x.size) * int(x.itemsize) // 16)
