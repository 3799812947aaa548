"""Random small nets: memory reuse, fusion, a shared workspace and recording change no bit of a loss, an output, a gradient or a weight.

Only a BatchNorm that is fused with a Scale rounds otherwise.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from solver_harness import Recorder, Watcher, make_solver, weights_of

from caffelite.backends.contract import Backend
from caffelite.errors import SpecError
from caffelite.graph import build_graph
from caffelite.net import Net
from caffelite.schema import NetSpec, SourceMap, net_from_text, pb
from caffelite.solver import loop
from caffelite.solver.loop import Solver

BATCH = 3
HEAD = """
layer { name: "d" type: "DummyData" top: "x" top: "y" top: "t" dummy_data_param { shape { dim: 3 dim: 4 dim: 5 dim: 4 } shape { dim: 3 dim: 4 dim: 5 dim: 4 }
  shape { dim: 3 } data_filler { type: "gaussian" std: 0.5 } data_filler { type: "uniform" min: -1 max: 1 } data_filler { type: "constant" value: 2 } } }
"""
WEIGHTS = "weight_filler { type: 'msra' }"
FILLED = WEIGHTS + " bias_filler { type: 'gaussian' std: 0.1 }"
ALONE = {  # one bottom, a top of its shape: in place where that is legal
    "BatchNorm": "",
    "Scale": "scale_param { bias_term: true filler { type: 'uniform' min: 0.5 max: 1.5 } }",
    "Bias": "bias_param { filler { type: 'gaussian' std: 0.2 } }",
    "ReLU": "",
    "ReLU leaky": "relu_param { negative_slope: 0.1 }",
    "ReLU odd": "relu_param { negative_slope: -0.4 }",
    "PReLU": "",
    "ELU": "",
    "Sigmoid": "",
    "TanH": "",
    "Dropout": "",
    "Softmax": "",
    "Power": "power_param { power: 2 scale: 0.3 shift: 0.2 }",
    "LRN": "lrn_param { local_size: 3 }",
    "LRN within": "lrn_param { local_size: 3 norm_region: WITHIN_CHANNEL }",
    "Pooling": "pooling_param { kernel_size: 3 stride: 1 pad: 1 }",
    "Pooling mean": "pooling_param { pool: AVE kernel_size: 3 stride: 1 pad: 1 }",
    "Convolution": f"convolution_param {{ num_output: 4 kernel_size: 3 pad: 1 {FILLED} }}",
    "Convolution flat": f"convolution_param {{ num_output: 4 kernel_size: 1 group: 2 bias_term: false {WEIGHTS} }}",
}
PAIRED = {
    "Eltwise": "",
    "Eltwise weighted": "eltwise_param { coeff: 0.5 coeff: -1 }",
    "Eltwise product": "eltwise_param { operation: PROD }",
    "Eltwise max": "eltwise_param { operation: MAX }",
    "Scale": "scale_param { axis: 0 bias_term: true }",
    "Bias": "bias_param { axis: 0 }",
}
NORMALISED = 1000  # nets of seeds from here on have BatchNorm, Scale and ReLU in place after each other
ROUTED = 2000  # from here on: parts joined and cut along the batch, and chains that a backend may fuse
WIDENED = 3000  # from here on: parts joined and cut along the channels
CHAINS = (  # what is put in a row, and each time which of it may be in place
    ("Convolution", "ReLU", "LRN", "Pooling max", "Dropout"),
    ("Pooling max", "Dropout"),
    ("Pooling mean", "Dropout"),
    ("Convolution", "ReLU", "Dropout", "Convolution"),
    ("Convolution", "LRN", "Pooling max"),
    ("Eltwise", "ReLU"),
    ("Eltwise", "ReLU", "Eltwise"),
)
ENDS = ("loss", "loss", "distance", "silence", "weight", "none")


class Draft:
    """A net in the making: its text, and the shape of each blob that may still be read."""

    def __init__(self, seed: int) -> None:
        self.rng, self.text, self.number = np.random.default_rng(seed), HEAD, 0
        self.normalises, self.routes, self.widens = NORMALISED <= seed < ROUTED, ROUTED <= seed < WIDENED, seed >= WIDENED
        self.param = net_from_text(HEAD).param
        self.shapes: dict[str, tuple[int, ...]] = {"x": (3, 4, 5, 4), "y": (3, 4, 5, 4)}

    def pick(self, options: Any) -> Any:
        return list(options)[self.rng.integers(len(options))]

    def add(self, kind: str, bottoms: list[str], tops: list[str], extra: str) -> bool:
        """Adds a layer if the net can still be built with it."""
        names = " ".join([f'bottom: "{b}"' for b in bottoms] + [f'top: "{t}"' for t in tops])
        line = f'layer {{ name: "l{self.number}" type: "{kind.split()[0]}" {names} {extra} }}\n'
        param = pb.NetParameter(force_backward=True)  # legal wherever a loss may stand
        param.MergeFrom(self.param)
        param.MergeFrom(net_from_text(line).param)
        try:
            graph = build_graph(NetSpec(param, SourceMap.unknown(), ""), phase=pb.TRAIN)
        except SpecError:
            return False
        self.param, self.text, self.number = param, self.text + line, self.number + 1
        self.shapes |= {top: graph.blobs[top].shape for top in tops if top not in bottoms}
        return True

    def settings(self, kind: str, text: str) -> str:
        draw = self.rng.random(3)
        params = 'param { name: "shared" }' if kind == "Convolution" and draw[0] < 0.3 else "param { lr_mult: 0 }" if "Conv" in kind and draw[0] > 0.9 else ""
        return f"{text} {params}" + (" propagate_down: false" if draw[1] < 0.04 else "")

    def grow(self) -> None:
        """One more layer in the middle of the net."""
        recent = list(self.shapes)[-self.pick((1, 1, 1, 3, 100)) :]  # mostly a chain
        bottom, top, draw = self.pick(recent), f"b{self.number}", self.rng.random()
        if self.routes and self.rng.random() < 0.5:
            self.route(bottom, top) if self.rng.random() < 0.5 else self.chain(bottom)
        elif self.widens and len(self.shapes[bottom]) == 4 and self.rng.random() < 0.6:
            self.widen(bottom, top)
        elif self.normalises and self.rng.random() < 0.3:
            top = bottom if self.rng.random() < 0.5 else top
            if self.add("BatchNorm", [bottom], [top], ""):
                self.add("Scale", [top], [top], ALONE["Scale"])
                self.add(self.pick(("ReLU", "ReLU", "TanH")), [top], [top], "")
        elif draw < 0.72:
            kind = self.pick(ALONE)
            self.add(kind, [bottom], [bottom if self.rng.random() < 0.5 else top], self.settings(kind, ALONE[kind]))
        elif draw < 0.86:
            kind = self.pick(PAIRED)
            other = self.pick([b for b, shape in self.shapes.items() if shape == self.shapes[bottom]])
            self.add(kind, [bottom, other], [bottom if self.rng.random() < 0.3 else top], PAIRED[kind])
        elif draw < 0.9:
            self.add("Slice", [bottom], [top, f"{top}s"], "")
        elif draw < 0.95:
            other = self.pick([b for b, shape in self.shapes.items() if len(shape) == 4])
            self.add("Concat", [bottom, other], [top], "")
        else:
            kind, text = self.pick((("Flatten", ""), ("Reshape", "reshape_param { shape { dim: 0 dim: -1 } }")))
            self.add(kind, [bottom], [top], text)

    def route(self, bottom: str, top: str) -> None:
        """Joins blobs along the batch, or cuts one; or gives one another shape and back."""
        kind, shape, same = self.pick(("join", "cut", "shape")), self.shapes[bottom], self.rng.random() < 0.5
        if kind == "join":
            others = [b for b, s in self.shapes.items() if s[1:] == shape[1:]]
            self.add("Concat", [bottom, *(self.pick(others) for _ in range(self.pick((1, 2))))], [top], "concat_param { axis: 0 }")
        elif kind == "cut":
            points = f"slice_point: {self.pick(range(1, shape[0]))}" if shape[0] > 1 else "slice_point: 1"
            self.add("Slice", [bottom], [top, f"{top}s"], f"slice_param {{ axis: 0 {points} }}")
        elif self.add("Flatten", [bottom], [f"{top}f"], "") and self.add(
            "Reshape", [f"{top}f"], [f"{top}r"], "reshape_param { shape { dim: 0 dim: -1 dim: 2 } }"
        ):
            self.add("ReLU", [f"{top}r"], [f"{top}r" if same else top], "")

    def widen(self, bottom: str, top: str) -> None:
        """Convolutions of one blob joined along the channels, perhaps with others; or a blob cut so."""
        if self.shapes[bottom][1] >= 8 and self.rng.random() < 0.3:
            point = self.pick(range(4, self.shapes[bottom][1], 4))
            self.add("Slice", [bottom], [top, f"{top}s"], f"slice_param {{ slice_point: {point} }}")
            return
        parts = [f"{top}{letter}" for letter in "uvw"[: self.pick((1, 2, 2, 3))]]
        for part in parts:
            window = self.pick(("kernel_size: 1", "kernel_size: 3 pad: 1"))
            self.add("Convolution", [bottom], [part], f"convolution_param {{ num_output: {self.pick((3, 4, 8, 8, 16))} {window} {FILLED} }}")
            if self.rng.random() < 0.7:
                self.add("ReLU", [part], [part], "")
        others = [b for b, s in self.shapes.items() if len(s) == 4 and (s[0], *s[2:]) == (self.shapes[bottom][0], *self.shapes[bottom][2:])]
        self.add("Concat", [*parts, *(self.pick(others) for _ in range(self.pick((0, 0, 1))))], [top], "")

    def chain(self, bottom: str) -> None:
        """Layers in a row, those in place that may be."""
        for kind in self.pick(CHAINS):
            top, kind = f"b{self.number}", "Pooling" if kind == "Pooling max" else kind
            if kind == "Eltwise":
                other = self.pick([b for b, shape in self.shapes.items() if shape == self.shapes[bottom]])
                added = self.add(kind, [bottom, other], [top], "")
            elif kind in ("ReLU", "Dropout"):
                top, added = bottom, self.add(kind, [bottom], [bottom], "")
            else:
                added = self.add(kind, [bottom], [top], ALONE[kind])
            if not added:
                return
            bottom = top

    def finish(self) -> None:
        """A loss, or something else, at every loose end; one loss at least."""
        read = {bottom for layer in self.param.layer for bottom in layer.bottom if bottom not in layer.top}
        loose = [b for b in self.shapes if b not in read]
        for i, bottom in enumerate(loose):
            last, whole = i == len(loose) - 1, self.shapes[bottom][0] == BATCH
            self.end(bottom, "loss" if last and whole else self.pick(ENDS) if whole else self.pick(("distance", "weight")))

    def end(self, bottom: str, how: str) -> None:
        top = f"e{self.number}"
        if how == "loss":
            assert self.add("InnerProduct", [bottom], [top], f"inner_product_param {{ num_output: 5 {FILLED} }}")
            assert self.add("SoftmaxWithLoss", [top, "t"], self.pick(([], [f"{top}l"])), self.pick(("", "loss_weight: 0.5")))
        elif how == "distance":
            self.add("EuclideanLoss", [bottom, self.pick([b for b, s in self.shapes.items() if s == self.shapes[bottom]])], [top], "")
        elif how == "silence":
            self.add("Silence", [bottom], [], "")
        elif how == "weight":
            self.add("Power", [bottom], [top], "power_param { scale: 0.1 } loss_weight: 0.25")


@cache
def random_net(seed: int) -> str:
    draft = Draft(seed)
    for bottom in ("x", "y"):  # gradient flows from the bottom up
        assert draft.add("Convolution", [bottom], [f"{bottom}c"], ALONE["Convolution"])
    for _ in range(20):
        draft.grow()
    draft.finish()
    return draft.text


def one_pass(net: Net, count: int) -> dict[str, np.ndarray]:
    """Loss, outputs, gradients and statistics of one pass, over a workspace full of NaN."""
    net.backend.fill(net.shared_buffer, 0xFF)
    net.context.forward_count = count
    net.zero_grads()
    net.forward()
    got = {"loss": np.array(net.loss()), **net.output_values()}
    net.backward()
    net.arena.settle_grads()
    for label, param in zip(net.arena.labels, net.arena.params):
        got |= {f"{label} diff": np.array(net.backend.to_host(param.diff)), label: np.array(net.backend.to_host(param.master))}
    return got


def spoil_what_is_dead(net: Net) -> None:
    """Before each layer's step all shared memory is filled with NaN where nothing lives that an earlier step wrote: what begins to live is not read
    before it is written, gaps included, and what has ended is not read any more."""
    last, regions = 2 * len(net.steps) - 1, [region for region in net.memory.regions if not region.persistent]

    def spoil(time: int) -> None:
        living = [(r.offset, r.offset + r.nbytes) for r in regions if (r.first < time or r.first == 0) and time <= r.last]  # sources are fed already
        start = 0
        for first, end in [*sorted(living), (net.memory.shared_bytes, 0)]:
            if first > start:
                net.backend.fill(net.backend.view(net.shared_buffer, start, (first - start,), "uint8"), 0xFF)
            start = max(start, end)

    net.hooks.before_forward.append(spoil)
    net.hooks.before_backward.append(lambda index: spoil(last - index))


def descend(net: Net) -> None:
    ops, arena = net.backend, net.arena
    ops.from_host(ops.to_host(arena.master) - np.float32(0.01) * ops.to_host(arena.grad), arena.master)
    net.parameters_changed()


@pytest.mark.parametrize("seed", [*range(16), *range(ROUTED, ROUTED + 16), *range(WIDENED, WIDENED + 12)])
def test_reuse_changes_nothing(backend: Backend, seed: int) -> None:
    text, precision = random_net(seed), "bfloat16" if seed % 3 == 2 else "float32"
    options: dict[str, Any] = {"backend": backend, "precision": precision, "seed": seed}
    apart, tight = (Net(net_from_text(text), phase=pb.TRAIN, observe=observe, **options) for observe in (True, False))
    tests = [Net(net_from_text(text), phase=pb.TEST, observe=net.observe, share=net, workspace=net, **options) for net in (apart, tight)]
    assert tight.memory.peak_bytes < apart.memory.peak_bytes
    for net in (tight, tests[1]):
        spoil_what_is_dead(net)
    for count in range(3):
        want, got = one_pass(apart, count), one_pass(tight, count)
        assert np.isfinite(want["loss"])
        assert want.keys() == got.keys()
        for name, values in want.items():
            np.testing.assert_array_equal(got[name], values, err_msg=f"{name} in pass {count} of\n{text}")
        for net in (apart, tight):
            descend(net)
        for net in tests:
            net.forward()
        for name, values in tests[0].output_values().items():
            np.testing.assert_array_equal(tests[1].output_values()[name], values, err_msg=f"{name} in test {count} of\n{text}")


UPDATES = (
    'type: "SGD" momentum: 0.9',
    'type: "Nesterov" momentum: 0.9',
    'type: "Adam" momentum: 0.9 momentum2: 0.99',
    'type: "AdaGrad"',
    'type: "RMSProp" rms_decay: 0.9',
)


def random_settings(seed: int) -> str:
    rng = np.random.default_rng([seed, 1])

    def pick(*options: Any) -> Any:
        return options[rng.integers(len(options))]

    return (
        f'base_lr: {pick(0.01, 0.001)} lr_policy: "step" gamma: 0.5 stepsize: 3 weight_decay: {pick(0, 0.01)} iter_size: {pick(1, 2, 3)} '
        f"average_loss: {pick(1, 3)} display: {pick(1, 3)} max_iter: 100 test_interval: 4 test_iter: 2 random_seed: {seed} "
        f"{pick(*UPDATES)} {pick('', 'clip_gradients: 0.5', 'clip_gradients: 5')}"
    )


def trained(ops: Backend, seed: int, heard: Recorder, observe: bool) -> tuple[Solver, Recorder]:
    precision = "bfloat16" if seed % 3 == 2 else "float32"
    solver = make_solver(random_settings(seed), random_net(seed), ops, listeners=[heard], observe=observe, precision=precision)
    for iterations in (1, 4, 3):
        solver.step(iterations)
    return solver, heard


def normalises(net: Net) -> bool:
    """Whether a BatchNorm is fused with a Scale, so that sums are added in another order."""
    return any(node.absorbed for node in net.graph.nodes)


@pytest.mark.parametrize(
    "seed", [*range(100, 104), *range(NORMALISED, NORMALISED + 3), *range(ROUTED + 100, ROUTED + 103), *range(WIDENED + 100, WIDENED + 102)]
)
def test_training_fused_and_recorded_is_training_step_by_step(backend: Backend, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """All of an iteration, as a device that runs ahead plays it back, with tests in between: the same weights and the same words."""
    monkeypatch.setattr(loop, "LOOK_SECONDS", 1e9)
    got, told = trained(backend, seed, Recorder(), False)
    assert normalises(got.net) == (NORMALISED <= seed < ROUTED)
    want, said = trained(backend, seed, Watcher(), not normalises(got.net))
    assert len(weights_of(want)) > 2
    for label, values in weights_of(want).items():
        assert np.isfinite(values).all()
        np.testing.assert_array_equal(weights_of(got)[label], values, err_msg=f"{label} in\n{random_net(seed)}\n{random_settings(seed)}")
    kinds = ("message", "display", "test", "test start")
    assert told.named(*kinds) == said.named(*kinds)
    assert len(said.named("test")) == 2


@pytest.mark.parametrize("seed", range(NORMALISED, NORMALISED + 8))
def test_fused_normalisation_changes_rounding_alone(backend: Backend, seed: int) -> None:
    """That of gradients; on oneDNN, whose primitive scales too, also that of values. Its gradients lie up to
    9e-6 of the largest from NumPy's, on either side."""
    text = random_net(seed)
    apart, tight = (Net(net_from_text(text), phase=pb.TRAIN, observe=observe, backend=backend, seed=seed) for observe in (True, False))
    assert normalises(tight)
    want, got = one_pass(apart, 0), one_pass(tight, 0)
    largest = max(np.abs(values).max() for name, values in want.items() if name.endswith("diff"))
    for name, values in want.items():
        plain = backend.name != "onednn"
        tolerance = (1e-5 if plain else 2e-5) * largest if name.endswith("diff") else 0 if plain else 1e-5 * np.abs(values).max()
        np.testing.assert_allclose(got[name], values, rtol=0, atol=tolerance, err_msg=f"{name} in\n{text}")
