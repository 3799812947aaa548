"""What a run needs of a GPU's memory, found without one: its nets are built and run once on a backend that only counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from caffelite import backends
from caffelite.backends.contract import Array, Backend
from caffelite.data.raw import RawLayout
from caffelite.layer import Layer
from caffelite.net import Net
from caffelite.schema import pb
from caffelite.solver.config import NetChoice
from caffelite.solver.iteration import Iteration
from caffelite.solver.nets import make_net
from caffelite.solver.restore import new_history
from caffelite.solver.rules import RULES
from caffelite.solver.scoring import Scorer

Prepare = Callable[[Layer], object]
RECORDED = 2  # the pass, of each net, that is recorded: the record holds the scratch memory of its time, and what is made later is beside it
ITERATIONS = 3  # at the most: a solver may test before the first and the third one


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
    backend, observe = backends.counting(), bool(param and param.debug_info)
    nets: list[Net] = []
    tails: list[Net] = []
    try:
        for choice in choices:
            nets.append(make_net(choice, nets[0] if nets else None, backend=backend, precision=precision, observe=observe, prepare=prepare))
            _blank(nets[-1])
        history = new_history(nets[0].arena, RULES[param.type].states) if param else []
        trained = param and nets[0].has_backward
        iteration = Iteration(nets[0], param, [state.flat for state in history], write_step=False) if param and trained else None
        tests = [(net, _passes(net, choice)) for choice, net in zip(choices, nets) if net.phase == pb.TEST]
        for number in range(ITERATIONS if tests else RECORDED):
            if tests and _tests_before(number, param):
                for net, passes in (*tests, *((tail, 1) for tail in tails)):
                    for _ in range(passes):
                        net.forward_again()
                tails = tails or [tail for choice, net in zip(choices, nets) if (tail := _tail(net, choice))]
            if nets[0].phase == pb.TRAIN:
                _train(nets[0], iteration)
        if param and param.display and param.max_iter % param.display == 0:
            nets[0].forward()  # the closing report, which nothing records
        return _parts(nets, len(history), backend.peak_bytes() or 0)
    finally:
        for net in (*nets, *tails):
            net.close()


class _Blank:
    """Stands for a BatchSource and reads nothing. What it does not know without opening the database, it takes for the least there can be."""

    def __init__(self, source: Any) -> None:
        self._source, self._shape, self.seed, self.position = source, source.item_shape, 0, 0
        self._held: list[Any] = []

    @property
    def count(self) -> int:
        return int(self._source.count)

    @property
    def is_open(self) -> bool:
        return bool(self._source.is_open)

    def load(self, ops: Backend, batch: int, dtype: str, images: Array, labels: Array | None) -> None:
        """Takes the memory that images on their way to `ops` take there."""
        if self._held or (self.is_open and self._source.raw_shape is None):
            return
        image, mean = self._source.raw_shape or self._shape, self._source.transformer.mean
        cached = self._source.param.cache == pb.DataParameter.DEVICE
        layout = RawLayout(batch, 0 if cached else batch, image, self._source.transformer.warp.width(image[0]))
        self._held = [ops.uploads(layout.nbytes)]
        if cached and self.is_open:
            self._held.append(ops.allocate(self.count * prod(image)))
        if mean is not None:
            self._held.append(ops.empty(mean.shape, "float32"))

    def seek(self, position: int) -> None:
        """All positions are alike."""

    def close(self) -> None:
        self._source.close()


def _blank(net: Net) -> None:
    """Lets a net's data layers read nothing."""
    for layer in net.data_layers:
        layer.source = _Blank(layer.source)  # type: ignore[assignment]  # has what a run asks of it


def _tests_before(number: int, param: pb.SolverParameter | None) -> bool:
    """Whether there is a test before an iteration; longer intervals than RECORDED are as that one."""
    return param is None or (number % min(param.test_interval, RECORDED) == 0 and (number > 0 or param.test_initialization))


def _passes(net: Net, choice: NetChoice) -> int:
    """Of a test net in one test, as far as they matter: how many batches a whole database makes is looked up if it is open, and else taken for enough."""
    known = choice.test_iter is None and all(layer.source.is_open for layer in net.data_layers)
    counts = [layer.source.count // net.batch_size for layer in net.data_layers if known]
    return min(choice.test_iter or RECORDED, RECORDED, *counts)


def _tail(net: Net, choice: NetChoice) -> Net | None:
    """The net for the smaller last batch of a whole database, where there is one and its size is known."""
    known = net.phase == pb.TEST and choice.test_iter is None and all(layer.source.is_open for layer in net.data_layers)
    tail = Scorer(net, None).tail() if known and net.data_layers else None
    if tail is not None:
        _blank(tail)
    return tail


def _train(net: Net, iteration: Iteration | None) -> None:
    """One iteration; without an update where there is no solver."""
    if iteration is not None:
        for part in range(iteration.param.iter_size):
            net.feed()
            iteration.run(part)
        return
    net.zero_grads()
    net.forward()
    net.loss()
    if net.has_backward:
        net.backward()


def _parts(nets: Sequence[Net], histories: int, peak: int) -> Footprint:
    lengths = [(net.arena.length, net) for net in nets]
    parameters = 4 * sum(length for length, _ in lengths)
    gradients = 4 * sum(length for length, net in lengths if net.arena.grad is not None)
    copies = 2 * sum(length for length, net in lengths if net.compute == "bfloat16")
    activations = sum(net.memory.persistent_bytes for net in nets) + sum({id(net.shared_buffer): net.shared_buffer.size for net in nets}.values())
    history = 4 * histories * nets[0].arena.length
    other = peak - parameters - gradients - copies - activations - history
    return Footprint(parameters, gradients, history, copies, activations, other, peak)
