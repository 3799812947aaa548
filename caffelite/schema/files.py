"""Reads net and solver definitions (prototxt) into their current form."""

from __future__ import annotations

import os
from dataclasses import dataclass

from caffelite import caffelite_pb2 as pb
from caffelite.errors import SpecError, Where
from caffelite.schema.binary import open_failure
from caffelite.schema.places import SourceMap
from caffelite.schema.text import parse_text
from caffelite.schema.upgrade import upgrade_net, upgrade_solver

LARGEST_TEXT = 16 * 2**20  # bytes; no definition written or generated comes near


@dataclass
class NetSpec:
    """A net as read: current-format NetParameter (legacy upgraded), where its fields stand, and the file's name."""

    param: pb.NetParameter
    where: SourceMap
    file: str


@dataclass
class SolverSpec:
    """A solver as read (legacy upgraded)."""

    param: pb.SolverParameter
    where: SourceMap
    file: str


def read_net(path: str | os.PathLike[str]) -> NetSpec:
    """The net in a prototxt file. SpecError with file:line:column for anything wrong in it."""
    return net_from_text(read_text(path, "a net prototxt"), os.fspath(path))


def net_from_text(text: str, file: str = "<text>") -> NetSpec:
    """The net in a text; `file` is how errors call it."""
    net = pb.NetParameter()
    places = parse_text(text, net, file)
    upgrade_net(net, places)
    return NetSpec(net, places, file)


def read_solver(path: str | os.PathLike[str]) -> SolverSpec:
    """The solver in a prototxt file, with Caffe's default snapshot_prefix. SpecError with file:line:column."""
    name = os.fspath(path)
    spec = solver_from_text(read_text(path, "a solver prototxt"), name)
    spec.param.snapshot_prefix = default_prefix(spec.param, name)
    return spec


def solver_from_text(text: str, file: str = "<text>") -> SolverSpec:
    """The solver in a text; `file` is how errors call it."""
    solver = pb.SolverParameter()
    places = parse_text(text, solver, file)
    upgrade_solver(solver, places)
    return SolverSpec(solver, places, file)


def default_prefix(solver: pb.SolverParameter, path: str) -> str:
    """Unset: the solver's path without its extension; an existing folder: a file in it named like the solver."""
    stem = os.path.splitext(path)[0]
    if not solver.HasField("snapshot_prefix"):
        return stem
    if os.path.isdir(solver.snapshot_prefix):
        return os.path.join(solver.snapshot_prefix, os.path.basename(stem))
    return solver.snapshot_prefix


def read_text(path: str | os.PathLike[str], wanted: str) -> str:
    """The text of a prototxt. SpecError when it is missing, unreadable, binary, not UTF-8 or absurdly large."""
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            data = file.read(LARGEST_TEXT + 1)
    except (OSError, ValueError) as error:
        raise open_failure(name, error if isinstance(error, OSError) else OSError(str(error)), wanted, SpecError) from error
    if b"\0" in data[:4096]:
        raise SpecError(f"the file is binary, expected {wanted}", where=Where(name), hint=_binary_hint(name))
    if len(data) > LARGEST_TEXT:
        raise SpecError(f"the file is larger than {LARGEST_TEXT >> 20} MiB, expected {wanted}", where=Where(name), hint=_binary_hint(name))
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line = before.count(b"\n") + 1
        column = len(before[before.rfind(b"\n") + 1 :].decode("utf-8", "replace")) + 1
        raise SpecError(f"byte 0x{data[error.start]:02x} is not UTF-8, expected {wanted}", where=Where(name, line, column), hint=_binary_hint(name)) from error


def _binary_hint(name: str) -> str:
    if name.endswith((".caffemodel", ".solverstate", ".binaryproto", ".h5")):
        return "a net or solver is described by a prototxt; stored weights and states are given with --weights or --snapshot"
    return "a prototxt is plain text; save it as UTF-8"
