"""--log FILE: the lines Caffe logs, in the shapes that log parsers read (two-field date: I1121 00:26:43.592013)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import datetime
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from caffelite.cli.common import number
from caffelite.cli.lines import LineFile, set_aside
from caffelite.schema import pb, to_text
from caffelite.solver.listeners import Listener, Output

if TYPE_CHECKING:
    from caffelite.graph import Node
    from caffelite.net import Net
    from caffelite.solver.loop import Solver

# Caffe's prefix names a line of its source as well; parsers ignore the number, and ours are of no source of Caffe's.
LINE = 1


def prefix(source: str, severity: str = "I", now: datetime | None = None) -> str:
    """The head of a log line, with the blank that follows it."""
    now = now or datetime.now()
    return f"{severity}{now:%m%d %H:%M:%S.%f} {threading.get_native_id():>5} {source}:{LINE}] "


class CaffeLog(Listener):
    """Writes a run to `path` as Caffe logs it. append: go on in an existing log; else one is kept as NAME.old, as parsers expect one run."""

    def __init__(self, path: Path, *, append: bool = False, clock: Callable[[], datetime] = datetime.now) -> None:
        if not append:
            set_aside(path)
        self._file = LineFile(path, "log")
        self._clock = clock
        self._early: list[tuple[str, str, str]] | None = []  # told while the nets are built; written when they can be shown
        self._displayed: int | None = None
        self._display = 0
        self._iteration = 0

    def line(self, text: str, source: str = "solver.cpp", severity: str = "I") -> None:
        """Writes one log line."""
        self._file.write(prefix(source, severity, self._clock()) + text)

    def close(self) -> None:
        """Closes the file; a run that failed while it was set up still leaves what was told."""
        for text, source, severity in self._early or []:
            self.line(text, source, severity)
        self._early = None
        self._file.close()

    # --- events --------------------------------------------------------------------------------------------------------

    def on_start(self, solver: Solver) -> None:
        self._displayed, self._display = None, solver.param.display
        nets = iter([solver.net, *solver.test_nets])
        told, self._early = self._early or [], None
        self.line("Initializing solver from parameters: \n" + to_text(solver.param))
        for text, source, severity in told:
            self.line(text, source, severity)
            if text.startswith("Creating t"):  # the nets' own lines, which nobody tells, belong here
                for line, where in net_lines(next(nets)):
                    self.line(line, where)

    def on_message(self, text: str, source: str, severity: str = "I") -> None:
        if self._early is None:
            self.line(text, source, severity)
        else:
            self._early.append((text, source, severity))

    def on_display(self, iteration: int, smoothed_loss: float, outputs: Sequence[Output], lr: float | None, seconds: float) -> None:
        if lr is None:  # the closing report
            self.line(f"Iteration {iteration}, loss = {number(smoothed_loss)}")
            return
        done = 0 if self._displayed is None else iteration - self._displayed
        rate = done / seconds if done and seconds > 0 else 0.0
        span = f"{number(rate)} iter/s, {number(seconds)}s/{self._display} iters"
        self._displayed = iteration
        self.line(f"Iteration {iteration} ({span}), loss = {number(smoothed_loss)}")
        self._outputs("Train", outputs)
        self.line(f"Iteration {iteration}, lr = {number(lr)}", "sgd_solver.cpp")

    def on_test(self, iteration: int, net_index: int, outputs: Sequence[Output], loss: float | None, records: int) -> None:
        if loss is not None:
            self.line(f"Test loss: {number(loss)}")
        self._outputs("Test", outputs)

    def _outputs(self, which: str, outputs: Sequence[Output]) -> None:
        for index, text in enumerate(output_lines(outputs)):
            self.line(f"    {which} net output #{index}: {text}")


def output_lines(outputs: Sequence[Output]) -> list[str]:
    """ "blob = value" of each scalar, with the weighted value of a loss."""
    lines = []
    for output in outputs:
        for value in output.values:
            loss = f" (* {number(output.weight)} = {number(output.weight * value)} loss)" if output.weight else ""
            lines.append(f"{output.blob} = {number(value)}{loss}")
    return lines


def net_lines(net: Net) -> list[tuple[str, str]]:
    """The lines of building a net, each with its source: parameters, layers, blobs, shapes, who runs backward, outputs."""
    lines = [("Initializing net from parameters: \n" + to_text(_described(net)), "net.cpp")]
    memory = 0
    for node in net.graph.nodes:
        memory += sum(4 * prod(top.shape) for top in node.tops)
        lines.append((f"Creating layer {node.name}", "layer_factory.hpp"))
        lines += [(text, "net.cpp") for text in _layer_lines(node)]
        lines.append((f"Memory required for data: {memory}", "net.cpp"))
    for node in reversed(net.graph.nodes):
        needs = "needs" if node.needs_backward else "does not need"
        lines.append((f"{node.name} {needs} backward computation.", "net.cpp"))
    lines += [(f"This network produces output {name}", "net.cpp") for name in net.outputs]
    return [*lines, ("Network initialization done.", "net.cpp")]


def _layer_lines(node: Node) -> list[str]:
    lines = [f"Creating Layer {node.name}"]
    lines += [f"{node.name} <- {bottom.label}" for bottom in node.bottoms]
    lines += [f"{node.name} -> {top.label}{' (in-place)' if node.written_in_place(i) else ''}" for i, top in enumerate(node.tops)]
    lines.append(f"Setting up {node.name}")
    for top, weight in zip(node.tops, node.loss_weights):
        lines.append(f"Top shape: {''.join(f'{size} ' for size in top.shape)}({prod(top.shape)})")
        lines += [f"    with loss weight {number(weight)}"] if weight else []
    return lines


def _described(net: Net) -> pb.NetParameter:
    """The net that was built: its name, its state, and the layers that the state selects."""
    described = pb.NetParameter(name=net.name, state=pb.NetState(phase=net.phase))  # type: ignore[arg-type]
    for layer in net.layers:
        copy = described.layer.add()
        copy.CopyFrom(layer.param)
        copy.ClearField("blobs")
    return described
