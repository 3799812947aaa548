"""Operands that broadcast, and sums over the axes along which they do: the host's side of kernels/broadcast.cuh."""

from __future__ import annotations

from math import prod

import numpy as np

from caffelite.backends.contract import Array, Ints
from caffelite.backends.cuda.common import THREADS, Base, cname
from caffelite.backends.cuda.launch import TYPES, Module

RUNS = np.dtype([(f"d{i}", np.int64) for i in range(4)])
MOST_TILES = 1024  # blocks of a sum where it has rows enough: a constant, so that sums do not depend on the machine
ROWS = 16  # of a sum: at least so many to a thread


def sums(term: str) -> list[str]:
    """The kernels that reduce() with this term launches."""
    widths = {"float": 4, "bf16": 8}
    return [f"reduce<{term}, {kind}, {n}>" for kind in TYPES for n in (1, widths[kind])] + ["reduce_finish<float>"]


def runs_of(shape: Ints, operand: Ints) -> Ints:
    """The sizes of shape's axes in memory order, neighbours joined: broadcast, kept, broadcast, kept, ... (at least four; 1 where there is none).

    An axis is kept where the operand has its size, and broadcast where that is 1 and shape's is not.
    """
    found = [1]
    for axis in (0, 2, 3, 1) if len(shape) == 4 else range(len(shape)):
        if shape[axis] == 1:
            continue
        is_kept = operand[axis] != 1
        if is_kept == len(found) % 2:  # the last run is of the other kind
            found.append(1)
        found[-1] *= shape[axis]
    found += [1] * (len(found) % 2)
    if len(found) == 2:
        broadcast, kept = found
        return (1, 1, broadcast, 1) if kept == 1 else (broadcast, 1, 1, kept)
    return tuple(found)


def as_struct(runs: Ints) -> np.void:
    """The kernels' struct Runs."""
    found: np.void = np.array([tuple(runs)], RUNS)[0]
    return found


def reduce(ops: Base, module: Module, term: str, x: Array | None, dy: Array, out: Array, runs: Ints, accumulate: bool) -> None:
    """out (+)= the sum of the term over the broadcast runs."""
    if not out.size:
        return
    if len(runs) > 4:  # the innermost broadcast run first
        *outer, rows, between, columns = runs
        count = prod(outer) * rows * columns
        middle = ops.new((count,), "float32")
        _reduce(ops, module, term, x, dy, middle, (1, prod(outer) * rows, between, columns), False)
        reduce(ops, module, "SumTerm", None, middle, out, (*outer, rows * columns), accumulate)
    else:
        _reduce(ops, module, term, x, dy, out, runs, accumulate)


def _reduce(ops: Base, module: Module, term: str, x: Array | None, dy: Array, out: Array, runs: Ints, accumulate: bool) -> None:
    """One run each: a pass that sums the rows of each slab, and one that sums the slabs where there are several."""
    wide = 16 // int(dy.itemsize)
    d0, d1, d2, d3 = runs
    lanes = wide if d3 == 1 and d2 % wide == 0 else 1  # neighbours of one output that are summed as if they belonged to several
    if lanes > 1:
        d2, d3 = d2 // lanes, lanes
    vector = wide if d3 % wide == 0 else 1
    block, tiles = _block(d0 * d2, d1 * d3 // vector, d3 // vector)
    slabs, run = _slabs(d0 * d2, block[1], tiles)
    terms, name = slabs * lanes, f"reduce<{term}, {cname(dy)}, {vector}>"
    partial = ops.scratch(8 * slabs * d1 * d3) if terms > 1 else None
    ops.launch(module, name, (tiles, slabs), block, x, dy, partial, out, as_struct((d0, d1, d2, d3)), np.int64(run), np.int32(accumulate))
    if terms > 1:
        warps = THREADS // 32
        grid = -(-out.size // warps)
        ops.launch(module, f"reduce_finish<{cname(out)}>", grid, THREADS, partial, out, np.int64(terms), np.int64(out.size), np.int32(accumulate))


def _block(rows: int, columns: int, near: int) -> tuple[Ints, int]:
    """Threads along the columns and along the rows, and how many blocks cover the columns. near: columns that are neighbours in memory."""
    across = near if near <= THREADS else 32
    down = max(1, min(rows, THREADS // across))
    across = max(across, min(columns, THREADS // down))
    return (across, down), -(-columns // across)


def _slabs(rows: int, down: int, tiles: int) -> tuple[int, int]:
    """Into how many slabs the rows are cut, and the rows of each."""
    most = max(1, min(-(-rows // (down * ROWS)), MOST_TILES // tiles))
    run = max(1, -(-rows // most))
    return max(1, -(-rows // run)), run
