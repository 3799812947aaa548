"""Scoring a TEST net: a number of batches as Caffe does, or every record of its database exactly once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from caffelite.errors import SpecError
from caffelite.net import Net
from caffelite.schema import NetSpec, SourceMap, pb
from caffelite.solver.listeners import Output

Watch = Callable[[int, int], bool]  # batches done, batches in all -> go on?


@dataclass(frozen=True)
class Scores:
    """Means over one test. loss: the mean total loss. records: how many records went in (0: no data layer counted them)."""

    outputs: list[Output]
    loss: float
    records: int


class Scorer:
    """Scores a net again and again.

    batches: how many batches one test takes, going on where the last one stopped; None: the whole database, from its first
    record to its last. A database that the batch size does not divide ends on a smaller batch, which a second net of
    that size runs, so that no record counts twice. SpecError when the whole database is asked for and cannot be counted.
    forward: runs a net forward; net.forward by default.
    """

    def __init__(self, net: Net, batches: int | None, forward: Callable[[Net], None] | None = None) -> None:
        self.net, self._run = net, forward or Net.forward_again
        self.whole = batches is None
        self._tail_size = 0
        self._tail: Net | None = None
        counted = _count_records(net) if batches is None else None
        if counted is not None:
            full, self._tail_size = divmod(counted, net.batch_size)
            self.batches, self.records = full + (self._tail_size > 0), counted
        else:
            self.batches = batches or 0
            self.records = self.batches * net.batch_size if net.data_layers else 0
        self._passes = 0

    def run(self, watch: Watch = lambda done, total: True) -> Scores | None:
        """One test; None when `watch`, called before every batch, said to stop."""
        means = _Means()
        if self.whole:
            _seek(self.net, 0)
        for done, (net, weight) in enumerate(self._batch_nets()):
            if not watch(done, self.batches):
                return None
            net.context.forward_count = self._passes
            self._passes += 1
            self._run(net)
            means.add(_checked_values(net), net.loss(), weight)
        return Scores(means.outputs(self.net), means.loss, self.records)

    def _batch_nets(self) -> Iterator[tuple[Net, float]]:
        size = self.net.batch_size
        for _ in range(self.batches - (self._tail_size > 0)):
            yield self.net, size if self.whole else 1.0
        if tail := self.tail():
            tail.share_with(self.net)  # whose parameters, like its seed, may have been changed since
            tail.context.seed = self.net.context.seed
            _seek(tail, self.records - self._tail_size)
            yield tail, self._tail_size

    def tail(self) -> Net | None:
        """The net for the last, smaller batch, made when it is first needed; None where all batches are full."""
        if self._tail_size and self._tail is None:
            self._tail = _with_batch(self.net, self._tail_size)
        return self._tail

    def close(self) -> None:
        """Closes the net for the last batch; the net that was given stays open."""
        if self._tail is not None:
            self._tail.close()


class _Means:
    """Weighted means of every scalar of every output; arrays of the tail's smaller batch count where they have values."""

    def __init__(self) -> None:
        self._sums: dict[str, npt.NDArray[np.float64]] = {}
        self._weights: dict[str, npt.NDArray[np.float64]] = {}
        self._loss = self._weight = 0.0

    def add(self, outputs: dict[str, np.ndarray], loss: float, weight: float) -> None:
        for name, values in outputs.items():
            flat = np.asarray(values, np.float64).ravel()
            if name not in self._sums or len(self._sums[name]) < len(flat):
                grown = np.zeros((2, len(flat)))
                if name in self._sums:
                    grown[0, : len(self._sums[name])], grown[1, : len(self._sums[name])] = self._sums[name], self._weights[name]
                self._sums[name], self._weights[name] = grown
            self._sums[name][: len(flat)] += weight * flat
            self._weights[name][: len(flat)] += weight
        self._loss += weight * loss
        self._weight += weight

    @property
    def loss(self) -> float:
        return self._loss / self._weight

    def outputs(self, net: Net) -> list[Output]:
        return [Output(name, tuple((self._sums[name] / self._weights[name]).tolist()), net.loss_weight(name)) for name in net.outputs]


def _checked_values(net: Net) -> dict[str, np.ndarray]:
    """The net's outputs. DataError for a label out of range, which a pass that is played back tells by a NaN."""
    values = net.output_values()
    if net.backend.runs_ahead and any(np.isnan(value).any() for value in values.values()):
        net.recheck()
    return values


def outputs_of(net: Net) -> list[Output]:
    """The outputs of a net's last forward pass, in Caffe's order."""
    return [Output(name, tuple(values.ravel().tolist()), net.loss_weight(name)) for name, values in net.output_values().items()]


def _seek(net: Net, position: int) -> None:
    for layer in net.data_layers:
        layer.source.seek(position)


def _count_records(net: Net) -> int:
    counts = {layer.name: layer.source.count for layer in net.data_layers}
    sizes = {step.layer.name: step.tops[0].shape[0] for step in net.steps if step.layer.name in counts}
    if not counts:
        hint = "add test_iter: the number of batches of one test"
        raise SpecError("the test net reads no database, so its records cannot be counted", hint=hint)
    if len(set(counts.values())) > 1 or len(set(sizes.values())) > 1:
        found = ", ".join(f"{name}: {counts[name]} records, batch_size {sizes[name]}" for name in counts)
        raise SpecError(f"the test net's data layers differ ({found})", hint="add test_iter: the number of batches of one test")
    return int(next(iter(counts.values())))


def _with_batch(net: Net, size: int) -> Net:
    """The same layers with the same parameters for batches of `size`."""
    param = pb.NetParameter(name=net.name)
    names = {layer.name for layer in net.data_layers}
    for layer in net.layers:
        copy = param.layer.add()
        copy.CopyFrom(layer.param)
        del copy.include[:], copy.exclude[:]
        if layer.name in names:
            copy.data_param.batch_size = size
    spec = NetSpec(param, SourceMap.unknown(), net.spec.file)
    return Net(
        spec,
        phase=net.phase,
        backend=net.backend,
        precision=net.precision,
        observe=net.observe,
        seed=net.seed,
        share=net,
        workspace=net,
        prepare=net.prepare,
    )
