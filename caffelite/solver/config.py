"""What a solver asks for, checked before anything is built: its numbers, and which nets it trains and tests."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass

from caffelite.errors import SpecError
from caffelite.graph import select_layers
from caffelite.schema import NetSpec, SolverSpec, pb, read_net
from caffelite.solver.rates import check_policy
from caffelite.solver.rules import check_rule

TRAIN_FIELDS = ("net", "net_param", "train_net", "train_net_param")


@dataclass(frozen=True)
class NetChoice:
    """One net of a solver: its definition, its state, and Caffe's words for where it comes from.

    test_iter: batches of one test; None: the whole database, once.
    """

    spec: NetSpec
    origin: str
    phase: int
    level: int
    stages: tuple[str, ...]  # beside those of the net's own state
    test_iter: int | None = None


def check_solver(spec: SolverSpec) -> None:
    """SpecError, placed in the solver file, for every setting that cannot work. Opens no other file."""
    param, at = spec.param, spec.where.at
    check_rule(spec)
    check_policy(spec)
    for name, least in (("average_loss", 1), ("iter_size", 1), ("max_iter", 0), ("display", 0), ("test_interval", 0), ("snapshot", 0), ("snapshot_keep", 0)):
        value = getattr(param, name)
        if value < least:
            raise SpecError(f"{name} must be {least} or greater, found {value}", where=at(name))
    for i, count in enumerate(param.test_iter):
        if count <= 0:
            hint = "leave test_iter out to score the whole database once"
            raise SpecError(f"test_iter must be 1 or greater, found {count}", where=at("test_iter", i), hint=hint)
    if param.random_seed < -1:
        raise SpecError(f"random_seed must be 0 or greater, found {param.random_seed}", where=at("random_seed"), hint="leave it out for a new seed each time")
    if param.snapshot > 0 and not param.snapshot_prefix:
        raise SpecError("snapshot is set but snapshot_prefix is not", where=at("snapshot"), hint='add snapshot_prefix: "runs/name"')
    if param.snapshot_best and not param.snapshot_prefix:
        raise SpecError("snapshot_best is set but snapshot_prefix is not", where=at("snapshot_best"), hint='add snapshot_prefix: "runs/name"')
    _check_net_fields(spec)


def check_best(spec: SolverSpec, outputs: Collection[str]) -> None:
    """SpecError when snapshot_best, if given, is not among the test nets' outputs."""
    name = spec.param.snapshot_best
    if name and name not in outputs:
        hint = f"its outputs: {', '.join(sorted(outputs))}" if outputs else "add a test net: test_interval, and TEST layers or test_net"
        raise SpecError(f"snapshot_best names '{name}', which no test net puts out", where=spec.where.at("snapshot_best"), hint=hint)


def _check_net_fields(spec: SolverSpec) -> None:
    param, at = spec.param, spec.where.at
    given = [name for name in TRAIN_FIELDS if param.HasField(name)]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        where = at(given[1]) if given else at()
        raise SpecError(f"a solver has exactly one of {', '.join(TRAIN_FIELDS)}; found {found}", where=where)
    declared, counts = len(param.test_net) + len(param.test_net_param), len(param.test_iter)
    shared = given[0] in ("net", "net_param")
    if counts and (counts < declared or (counts != declared and not shared)):
        expected = f"at least {declared}" if shared else str(declared)
        raise SpecError(f"{expected} test_iter value(s) expected, one per test net; found {counts}", where=at("test_iter"))
    if (declared or counts) and param.test_interval <= 0:
        raise SpecError("a test net needs test_interval greater than 0", where=at("test_iter" if counts else "test_net"), hint="add test_interval: 500, say")


def train_choice(spec: SolverSpec) -> NetChoice:
    """The train net in its state {TRAIN} <- the file's state <- train_state."""
    param = spec.param
    name = next(name for name in TRAIN_FIELDS if param.HasField(name))
    net = _read(spec, name)
    origin = f"from {name} file: {net.file}" if name in ("net", "train_net") else f"specified in {name}."
    state = pb.NetState(phase=pb.TRAIN)
    state.MergeFrom(net.param.state)
    state.MergeFrom(param.train_state)
    return NetChoice(net, origin, state.phase, state.level, tuple(param.train_state.stage))


def test_choices(spec: SolverSpec, train: NetChoice) -> list[NetChoice]:
    """The test nets in Caffe's order. Unlike Caffe, test nets without any test_iter are scored on their whole database."""
    param = spec.param
    sources = [(_inline(spec, "test_net_param", i), "test_net_param") for i in range(len(param.test_net_param))]
    for i, path in enumerate(param.test_net):
        net = _open(spec, path, "test_net", i)
        sources.append((net, f"test_net file: {net.file}"))
    if param.HasField("net") or param.HasField("net_param"):
        copies = len(param.test_iter) - len(sources)
        if not param.test_iter and not sources and param.test_interval > 0:
            copies = int(_reads_database(train.spec))
        sources += [(train.spec, f"net file: {train.spec.file}" if param.HasField("net") else "net_param")] * copies
    if len(param.test_state) not in (0, len(sources)):
        raise SpecError(
            f"{len(param.test_state)} test_state(s) for {len(sources)} test net(s)", where=spec.where.at("test_state"), hint="give one per test net, or none"
        )
    return [_test_choice(param, i, net, origin) for i, (net, origin) in enumerate(sources)]


def _test_choice(param: pb.SolverParameter, index: int, net: NetSpec, origin: str) -> NetChoice:
    state = pb.NetState(phase=pb.TEST)
    stages: tuple[str, ...] = ()
    state.MergeFrom(net.param.state)
    if param.test_state:
        state.MergeFrom(param.test_state[index])
        stages = tuple(param.test_state[index].stage)
    return NetChoice(net, origin, state.phase, state.level, stages, param.test_iter[index] if param.test_iter else None)


def _reads_database(net: NetSpec) -> bool:
    """Whether the net in phase TEST has a layer whose records can be counted."""
    state = pb.NetState(phase=pb.TEST)
    state.MergeFrom(net.param.state)
    return any(layer.type == "Data" for layer, _ in select_layers(net, state))


def _read(spec: SolverSpec, name: str) -> NetSpec:
    if name in ("net", "train_net"):
        return _open(spec, getattr(spec.param, name), name)
    return _inline(spec, name)


def _inline(spec: SolverSpec, name: str, *index: int) -> NetSpec:
    value = getattr(spec.param, name)
    return NetSpec(value[index[0]] if index else value, spec.where.child(name, *index), spec.file)


def _open(spec: SolverSpec, path: str, *place: str | int) -> NetSpec:
    if not os.path.exists(path):
        raise SpecError(f"the net file '{path}' does not exist", where=spec.where.at(*place), hint=f"paths are taken from the working folder, {os.getcwd()}")
    return read_net(path)
