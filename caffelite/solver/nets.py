"""SolverNets: the nets of a solver, built and with the weights they start from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from caffelite.backends.contract import Backend
from caffelite.errors import SpecError, Where
from caffelite.graph import Graph
from caffelite.net import Net
from caffelite.schema import SolverSpec
from caffelite.solver.config import NetChoice, check_best, test_choices, train_choice
from caffelite.solver.debug import forward_with_debug
from caffelite.solver.listeners import DATA_LAYER
from caffelite.solver.scoring import Scorer
from caffelite.weights import left_to_fillers


def make_net(choice: NetChoice, train: Net | None, **options: Any) -> Net:
    """The net of a choice. train: the net whose parameters and whose arena of passing values it shares, if any; options: the others of Net."""
    return Net(choice.spec, phase=choice.phase, level=choice.level, stages=choice.stages, share=train, workspace=train, **options)


class SolverNets:
    """A solver's nets: `train`, `tests` that share its parameters, and a Scorer for each of these.

    backend, precision, observe, seed: as for Net. tell(text, source, severity="I"): passes on lines in Caffe's words. SpecError for whatever
    is wrong with the nets, DataError for a database that cannot be read.
    """

    def __init__(self, spec: SolverSpec, backend: Backend, *, precision: str, observe: bool, seed: int, tell: Callable[..., None]) -> None:
        self._spec, self._tell = spec, tell
        self._options = {"backend": backend, "precision": precision, "observe": observe, "seed": seed}
        self.tests: list[Net] = []
        self.scorers: list[Scorer] = []
        choice = train_choice(spec)
        tests = test_choices(spec, choice)
        tell(f"Creating training net {choice.origin}", "solver.cpp")
        self.train = self._make(choice, None)
        try:
            for i, test in enumerate(tests):
                tell(f"Creating test net (#{i}) specified by {test.origin}", "solver.cpp")
                self.tests.append(self._make(test, self.train))
                self.scorers.append(self._scorer(self.tests[-1], test))
            if spec.param.snapshot_best:
                self._check_best(spec.param.snapshot_best)
        except BaseException:
            self.close()
            raise

    def _make(self, choice: NetChoice, train: Net | None) -> Net:
        net = make_net(choice, train, **self._options)
        net.context.tell = lambda text: self._tell(text, DATA_LAYER)
        return net

    def _scorer(self, net: Net, choice: NetChoice) -> Scorer:
        forward = (lambda net: forward_with_debug(net, self._tell)) if self._spec.param.debug_info else None
        try:
            return Scorer(net, choice.test_iter, forward)
        except SpecError as error:
            error.where = error.where or self._spec.where.at("test_interval")
            raise

    def _check_best(self, name: str) -> None:
        check_best(self._spec, {output for net in self.tests for output in net.outputs})
        where = self._spec.where.at("snapshot_best")
        net = next(net for net in self.tests if name in net.outputs)
        if net.blobs[name].count != 1:
            raise SpecError(f"snapshot_best names '{name}', which has {net.blobs[name].count} values", where=where, hint="name an output of one value")

    def load(self, files: Sequence[str]) -> None:
        """Copies weights by layer name into every net from model files, later ones overwriting. SnapshotError as for Net.copy_from."""
        for net in (self.train, *self.tests):
            for path in (part.strip() for paths in files for part in paths.split(",")):
                self._tell(f"Finetuning from {path}", "solver.cpp")
                for layer in net.copy_from(Path(path)):
                    self._tell(f"Ignoring source layer {layer}", "net.cpp")
        if files and (left := left_to_fillers(self.train)):
            self._tell(f"{', '.join(files)}: {left}", "net.cpp", "W")

    def check_trainable(self) -> None:
        """SpecError when there is nothing to train: no iterations, or no parameter that learns."""
        if self._spec.param.max_iter <= 0:
            where = self._spec.where.at("max_iter")
            raise SpecError("max_iter is missing or 0: there is nothing to do", where=where, hint="add max_iter: the number of updates")
        check_learns(self.train.graph, self.train.spec.where.at())

    def close(self) -> None:
        """Ends the data layers' threads and closes their files."""
        for scorer in self.scorers:
            scorer.close()
        for net in (*self.tests, self.train):
            net.close()


def check_learns(graph: Graph, where: Where | None) -> None:
    """SpecError, placed at the train net, when none of its parameters learns."""
    if not any(any(node.learn) for node in graph.nodes if node.needs_backward):
        raise SpecError("no parameter of the train net learns from a loss", where=where, hint="check the loss layer, loss_weight and lr_mult")
