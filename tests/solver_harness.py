"""Solvers for tests: a linear net whose whole training can be restated in float64, and a small one over the golden LMDB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from caffelite import backends
from caffelite.backends.contract import Backend
from caffelite.schema import solver_from_text
from caffelite.solver.listeners import Listener, Output
from caffelite.solver.loop import Solver

GOLDEN = Path(__file__).parent / "golden" / "training"
RATE = 'base_lr: 0.1 lr_policy: "fixed" '
SHAPE_X, SHAPE_T = (7, 5), (7, 3)

LINEAR = """
  layer { name: "x" type: "Input" top: "x" top: "t" input_param { shape { dim: 7 dim: 5 } shape { dim: 7 dim: 3 } } }
  layer { name: "ip" type: "InnerProduct" bottom: "x" top: "y" param { lr_mult: 1.5 decay_mult: 0.5 } param { lr_mult: 2 decay_mult: 0 }
    inner_product_param { num_output: 3 weight_filler { type: "gaussian" std: 0.5 } bias_filler { type: "constant" value: 0.25 } } }
  layer { name: "loss" type: "EuclideanLoss" bottom: "y" bottom: "t" top: "loss" }
"""

# Crop, mirror, shuffle and dropout: everything random that a resumed run must draw again. 200 records, batches of 16 and 30.
IMAGES = """
  layer { name: "data" type: "Data" top: "data" top: "label" include { phase: TRAIN } transform_param { crop_size: 32 mirror: true scale: 0.0078125 }
    data_param { source: "LMDB" backend: LMDB batch_size: 16 shuffle: true } }
  layer { name: "data" type: "Data" top: "data" top: "label" include { phase: TEST } transform_param { crop_size: 32 scale: 0.0078125 }
    data_param { source: "LMDB" backend: LMDB batch_size: 30 } }
  layer { name: "conv" type: "Convolution" bottom: "data" top: "conv" convolution_param { num_output: 6 kernel_size: 5 stride: 3
    weight_filler { type: "msra" } } }
  layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
  layer { name: "pool" type: "Pooling" bottom: "conv" top: "pool" pooling_param { kernel_size: 3 stride: 2 } }
  layer { name: "drop" type: "Dropout" bottom: "pool" top: "pool" dropout_param { dropout_ratio: 0.4 } }
  layer { name: "ip" type: "InnerProduct" bottom: "pool" top: "ip" inner_product_param { num_output: 10 weight_filler { type: "xavier" } } }
  layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }
  layer { name: "accuracy" type: "Accuracy" bottom: "ip" bottom: "label" top: "accuracy" include { phase: TEST } }
"""


def make_solver(text: str, net: str, backend: Backend | None = None, *, seeded: bool = True, **options: Any) -> Solver:
    """A solver over an inline net; "LMDB" in it stands for the golden database. seeded: give it a random_seed if it has none."""
    if seeded and "random_seed" not in text:
        text += "\nrandom_seed: 2"
    net = net.replace('"LMDB"', f'"{GOLDEN / "lmdb"}"')
    return Solver(solver_from_text(f"net_param {{ {net} }}\n{text}", "s.prototxt"), backend=backend or backends.get("numpy"), **options)


def linear_solver(text: str, backend: Backend | None = None, **options: Any) -> Solver:
    """A solver over LINEAR with fixed inputs in place."""
    solver = make_solver(text, LINEAR, backend, **options)
    rng = np.random.default_rng(5)
    for name, shape in (("x", SHAPE_X), ("t", SHAPE_T)):
        solver.backend.from_host(rng.normal(size=shape).astype(np.float32), solver.net.blobs[name].data)
    return solver


def weights_of(solver: Solver) -> dict[str, np.ndarray]:
    """Copies of all master weights, by "layer/index"."""
    return {label: np.array(solver.backend.to_host(p.master)) for label, p in zip(solver.net.arena.labels, solver.net.arena.params)}


class Recorder(Listener):
    """Keeps every event as a tuple."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def on_start(self, solver: Solver) -> None:
        self.events.append(("start", solver.iter))

    def on_message(self, text: str, source: str, severity: str = "I") -> None:
        self.events.append(("message", text, source, severity))

    def on_iteration(self, iteration: int, loss: float) -> None:
        self.events.append(("iteration", iteration, loss))

    def on_display(self, iteration: int, smoothed_loss: float, outputs: Any, lr: float | None, seconds: float) -> None:
        self.events.append(("display", iteration, smoothed_loss, tuple(outputs), lr))

    def on_test_start(self, iteration: int, net_index: int) -> None:
        self.events.append(("test start", iteration, net_index))

    def on_test(self, iteration: int, net_index: int, outputs: Any, loss: float | None, records: int) -> None:
        self.events.append(("test", iteration, net_index, tuple(outputs), loss, records))

    def on_snapshot(self, model: Path, state: Path) -> None:
        self.events.append(("snapshot", str(model), str(state)))

    def on_best(self, iteration: int, output: str, value: float, model: Path) -> None:
        self.events.append(("best", iteration, output, value, str(model)))

    def on_end(self, stopped: bool) -> None:
        self.events.append(("end", stopped))

    def named(self, *names: str) -> list[tuple[Any, ...]]:
        """The events of these kinds."""
        return [event for event in self.events if event[0] in names]

    def messages(self) -> list[str]:
        """All message texts."""
        return [event[1] for event in self.named("message")]

    def warnings(self) -> list[str]:
        """The texts of warnings."""
        return [event[1] for event in self.named("message") if event[3] == "W"]


def value_of(outputs: tuple[Output, ...], blob: str) -> float:
    """The single value of a named output."""
    return next(output.values[0] for output in outputs if output.blob == blob)


class Watcher(Recorder):
    """Wants the gradients of every iteration, so that nothing is recorded."""

    def on_gradients(self, iteration: int) -> None:
        pass
