"""What a prototxt is, a net or a solver, and where a solver asks for a GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator

from caffelite.errors import SpecError, Where
from caffelite.schema import NetSpec, SolverSpec, pb, read_net, read_solver

PIECE = re.compile(r"""#[^\n]*|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|[{}<>]|[A-Za-z_]\w*(?=\s*[:{<])""")
ENOUGH = 2**20  # characters to look at; a file that has shown nothing by then is no solver


def is_solver(path: str) -> bool:
    """Whether a prototxt has more of a solver's fields than of a net's at its top level. False for what cannot be read."""
    return _leaning(path) > 0


def load_solver(path: str) -> SolverSpec:
    """read_solver for a flag's value: a net given in its place is called one."""
    try:
        return read_solver(path)
    except SpecError as error:
        if _leaning(path) >= 0:
            raise
        raise SpecError("this is a net, expected a solver", where=Where(path), hint='a solver has base_lr, max_iter and net: "FILE"; see solvers/') from error


def load_net(path: str) -> NetSpec:
    """read_net for a flag's value: a solver given in its place is called one."""
    try:
        return read_net(path)
    except SpecError as error:
        if _leaning(path) <= 0:
            raise
        raise SpecError("this is a solver, expected a net", where=Where(path), hint="a net has layers; give the file that the solver's net: names") from error


def _leaning(path: str) -> int:
    """How many more of a solver's own fields than of a net's a prototxt has at its top level; 0 for what cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            names = set(top_level_names(file.read(ENOUGH)))
    except OSError:
        return 0
    solver, net = set(pb.SolverParameter.DESCRIPTOR.fields_by_name), set(pb.NetParameter.DESCRIPTOR.fields_by_name)
    return len(names & (solver - net)) - len(names & (net - solver))


def top_level_names(text: str) -> Iterator[str]:
    """The field names outside all braces, in order."""
    depth = 0
    for match in PIECE.finditer(text):
        piece = match[0]
        if piece in "{<":
            depth += 1
        elif piece in "}>":
            depth -= 1
        elif depth == 0 and piece[0] not in "#\"'":
            yield piece


def gpu_place(spec: SolverSpec) -> Where | None:
    """Where the solver asks for a GPU in so many words (the schema's default, GPU, does not count, as in Caffe); None if it does not."""
    if spec.param.HasField("solver_mode") and spec.param.solver_mode == pb.SolverParameter.GPU:
        return spec.where.at("solver_mode") or Where(spec.file)
    return None


def gpu_of(spec: SolverSpec) -> int:
    """The number of the GPU that a solver with solver_mode: GPU runs on: its device_id."""
    return spec.param.device_id
