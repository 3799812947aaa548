"""What a run needs of a GPU's memory, found without one: its nets are built and run once on a backend that only counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from caffelite import backends
from caffelite.backends.contract import Backend, Ints
from caffelite.layer import Layer
from caffelite.net import Net
from caffelite.schema import pb
from caffelite.solver.config import NetChoice
from caffelite.solver.restore import new_history
from caffelite.solver.rules import RULES, apply_rule
from caffelite.solver.scoring import Scorer

Prepare = Callable[[Layer], object]
ITERATIONS = 2  # what the first one leaves is there when the second one is at its peak


@dataclass(frozen=True)
class Footprint:
    """Bytes of device memory. peak: the most at any time, of which the others are parts; `other` is scratch memory, tables and rounding.

    copies: parameters in the type of the activations. CUDA's own needs (context, code of the kernels) are not in it.
    """

    parameters: int
    gradients: int
    histories: int
    copies: int
    activations: int
    other: int
    peak: int

    def as_dict(self) -> dict[str, int]:
        """The fields as NAME_bytes, for JSON."""
        return {f"{name}_bytes": value for name, value in asdict(self).items()}


def footprint(choices: Sequence[NetChoice], *, precision: str, param: pb.SolverParameter | None = None, prepare: Prepare = lambda layer: None) -> Footprint:
    """What a run of these nets needs: the first one, and others that share its parameters and its arena, as a solver's test nets do.

    param: the solver's; without one, the net runs forward, and backward in phase TRAIN, but is not updated. prepare: called with each layer
    before it is asked for shapes. Data layers without a size from it open their databases: DataError when one cannot be read.
    """
    backend = backends.counting()
    nets: list[Net] = []
    tails: list[Net] = []
    try:
        for choice in choices:
            nets.append(_net(choice, backend, precision, param, nets[0] if nets else None, prepare))
            _blank(nets[-1])
        history = new_history(nets[0].arena, RULES[param.type].states) if param else []
        for _ in range(ITERATIONS):
            for net in (*(net for net in nets if net.phase == pb.TEST), *tails):
                net.forward()
            tails = tails or [tail for choice, net in zip(choices, nets) if (tail := _tail(net, choice))]
            if nets[0].phase == pb.TRAIN:
                _train(nets[0], param, [state.flat for state in history])
        return _parts(nets, len(history), backend.peak_bytes() or 0)
    finally:
        for net in (*nets, *tails):
            net.close()


def _net(choice: NetChoice, backend: Backend, precision: str, param: pb.SolverParameter | None, first: Net | None, prepare: Prepare) -> Net:
    return Net(
        choice.spec,
        phase=choice.phase,
        level=choice.level,
        stages=choice.stages,
        backend=backend,
        precision=precision,
        observe=bool(param and param.debug_info),
        share=first,
        workspace=first,
        prepare=prepare,
    )


class _Blank:
    """Stands for a BatchSource and hands out zeros that take no memory."""

    def __init__(self, source: Any) -> None:
        self._source, self._shape, self.seed, self.position = source, source.item_shape, 0, 0
        self._batch = 0

    @property
    def count(self) -> int:
        return int(self._source.count)

    @property
    def is_open(self) -> bool:
        return bool(self._source.is_open)

    def start(self, batch: int, dtype: str = "float32") -> None:
        """Notes the size of batches."""
        self._batch = batch

    def take(self, use: Callable[[Any, Any], object]) -> None:
        """Hands out zeros of the size asked for."""
        use(_zeros((self._batch, *self._shape)), _zeros((self._batch,)))

    def seek(self, position: int) -> None:
        """All positions are alike."""

    def close(self) -> None:
        self._source.close()


def _zeros(shape: Ints) -> Any:
    return np.broadcast_to(np.zeros((), np.float32), shape)


def _blank(net: Net) -> None:
    """Lets a net's data layers read nothing."""
    for layer in net.data_layers:
        layer.source = _Blank(layer.source)


def _tail(net: Net, choice: NetChoice) -> Net | None:
    """The net for the smaller last batch of a whole database, where there is one and its size is known."""
    known = net.phase == pb.TEST and choice.test_iter is None and all(layer.source.is_open for layer in net.data_layers)
    tail = Scorer(net, None).tail() if known and net.data_layers else None
    if tail is not None:
        _blank(tail)
    return tail


def _train(net: Net, param: pb.SolverParameter | None, states: list[Any]) -> None:
    """One iteration."""
    net.zero_grads()
    net.forward()
    net.loss()
    if not net.has_backward:
        return
    net.backward()
    if param is not None:
        arena = net.arena
        arena.settle_grads()
        if param.clip_gradients >= 0:
            net.backend.sum_squares(arena.grad)
        segments = arena.segments(param.base_lr, param.weight_decay)
        apply_rule(param, net.backend, arena.master, arena.grad, states, segments, iteration=0, grad_scale=1.0, write_step=False)


def _parts(nets: Sequence[Net], histories: int, peak: int) -> Footprint:
    lengths = [(net.arena.length, net) for net in nets]
    parameters = 4 * sum(length for length, _ in lengths)
    gradients = 4 * sum(length for length, net in lengths if net.arena.grad is not None)
    copies = 2 * sum(length for length, net in lengths if net.compute == "bfloat16")
    activations = sum(net.memory.persistent_bytes for net in nets) + sum({id(net.shared_buffer): net.shared_buffer.size for net in nets}.values())
    history = 4 * histories * nets[0].arena.length
    other = peak - parameters - gradients - copies - activations - history
    return Footprint(parameters, gradients, history, copies, activations, other, peak)
