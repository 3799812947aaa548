"""Blobs that are channels of others: which are, on a backend that takes gaps between pixels, and that a net computes the same either way."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from solver_harness import make_solver, weights_of

from caffelite import backends
from caffelite.backends.contract import Backend
from caffelite.fusion import fuse
from caffelite.graph import BlobInfo, Graph, build_graph
from caffelite.memory import plan_memory
from caffelite.net import Net
from caffelite.schema import net_from_text, pb
from caffelite.sharing import Place

DATA = """layer { name: "d" type: "DummyData" top: "x" top: "t" dummy_data_param { shape { dim: 3 dim: 16 dim: 5 dim: 7 } shape { dim: 3 }
  data_filler { type: "gaussian" std: 1 } data_filler { type: "constant" value: 2 } } }
"""
ALL, NONE = frozenset({0, 1}), frozenset[int]()
FIRST, SECOND = frozenset({0}), frozenset({1})
Held = dict[str, tuple[frozenset[int], frozenset[int]]]


def layer(kind: str, name: str, bottoms: str, tops: str, fields: str = "") -> str:
    names = " ".join([f'bottom: "{b}"' for b in bottoms.split()] + [f'top: "{t}"' for t in tops.split()])
    return f'layer {{ name: "{name}" type: "{kind}" {names} {fields} }}\n'


def conv(bottom: str, top: str, outputs: int = 16, fields: str = "kernel_size: 1") -> str:
    fillers = 'weight_filler { type: "msra" } bias_filler { type: "gaussian" std: 0.3 }'
    return layer("Convolution", f"to {top}", bottom, top, f"convolution_param {{ num_output: {outputs} {fields} {fillers} }}")


def relu(blob: str) -> str:
    return layer("ReLU", f"relu {blob}", blob, blob)


def join(bottoms: str, top: str) -> str:
    return layer("Concat", f"join {top}", bottoms, top)


def cut(bottom: str, tops: str) -> str:
    return layer("Slice", f"cut {bottom}", bottom, tops)


def add(bottoms: str, top: str) -> str:
    return layer("Eltwise", f"sum {top}", bottoms, top)


WIDE = "kernel_size: 3 pad: 1"
SQUEEZED = conv("x", "s", 8) + relu("s")
FIRE = SQUEEZED + conv("s", "a") + relu("a") + conv("s", "b", 24, WIDE) + relu("b") + join("a b", "j")
POOL = layer("Pooling", "pool", "j", "z", "pooling_param { kernel_size: 3 stride: 2 }")
TWO = conv("x", "a") + conv("x", "b", 24, WIDE)
# What makes "z" out of "x", and what the layers hold of data and of gradients where gaps are taken.
NETS: dict[str, tuple[str, Held]] = {
    "a fire": (FIRE + conv("j", "z", 8), {"join j": (ALL, ALL)}),
    "a fire that is pooled": (FIRE + POOL, {"join j": (ALL, ALL)}),
    "a fire that is split": (FIRE + conv("j", "u", 8) + conv("j", "v", 8, WIDE) + add("u v", "z"), {"join j": (ALL, ALL)}),
    "a fire that is dropped": (FIRE + layer("Dropout", "drop", "j", "j") + conv("j", "z", 8), {"join j": (ALL, ALL)}),
    "an inception": (
        SQUEEZED + conv("x", "a") + relu("a") + conv("s", "b", 24, WIDE) + relu("b") + conv("s", "c", 8, "kernel_size: 5 pad: 2") + relu("c")
        + layer("Pooling", "pool", "x", "p", "pooling_param { kernel_size: 3 stride: 1 pad: 1 }") + conv("p", "e", 8) + relu("e")
        + join("a b c e", "j") + conv("j", "u", 8) + layer("Pooling", "pool2", "j", "k", "pooling_param { kernel_size: 3 stride: 1 pad: 1 }")
        + conv("k", "v", 8) + add("u v", "z"),
        {"join j": (frozenset(range(4)), frozenset(range(4)))},
    ),
    "a ReLU after": (TWO + join("a b", "j") + relu("j") + conv("j", "z", 8), {"join j": (ALL, ALL)}),
    "no ReLU": (TWO + join("a b", "j") + conv("j", "z", 8), {"join j": (ALL, ALL)}),
    "one ReLU": (TWO + relu("a") + join("a b", "j") + conv("j", "z", 8), {"join j": (SECOND, SECOND)}),
    "another layer between": (TWO + layer("TanH", "h", "a", "a") + join("a b", "j") + conv("j", "z", 8), {"join j": (SECOND, SECOND)}),
    "a part that is used elsewhere": (TWO + join("a b", "j") + conv("j", "u", 8) + conv("a", "v", 8) + add("u v", "z"), {"join j": (SECOND, SECOND)}),
    "a part that is dropped": (
        conv("x", "a").replace("convolution_param", "param { lr_mult: 0 } param { lr_mult: 0 } convolution_param")
        + layer("Dropout", "drop", "a", "a") + conv("x", "b") + join("a b", "j") + conv("j", "z", 8),
        {"join j": (SECOND, SECOND)},
    ),
    "a source": (conv("x", "b", 24) + join("x b", "j") + conv("j", "z", 8), {"join j": (SECOND, SECOND)}),
    "groups": (conv("x", "a", 16, "kernel_size: 1 group: 2") + conv("x", "b") + join("a b", "j") + conv("j", "z", 8), {"join j": (SECOND, SECOND)}),
    "along other axes": (
        conv("x", "a", 5, "axis: 2 kernel_size: 1") + conv("x", "b") + join("a b", "j") + conv("j", "z", 8),
        {"join j": (SECOND, SECOND)},
    ),
    "odd channels": (conv("x", "a") + conv("x", "b", 7) + join("a b", "j") + conv("j", "z", 8), {"join j": (NONE, NONE)}),
    "joined twice": (
        TWO + join("a b", "j") + conv("x", "c") + join("j c", "k") + conv("k", "z", 8),
        {"join j": (ALL, ALL), "join k": (SECOND, SECOND)},
    ),
    "cut": (conv("x", "a") + cut("a", "u v") + conv("u", "b") + conv("v", "c", 16, WIDE) + add("b c", "z"), {"cut a": (ALL, ALL)}),
    "cut and joined": (conv("x", "a") + cut("a", "u v") + join("u v", "z"), {"cut a": (ALL, ALL), "join z": (NONE, NONE)}),
    "cut and turned": (conv("x", "a") + cut("a", "u v") + join("v u", "z"), {"cut a": (ALL, ALL), "join z": (NONE, NONE)}),
    "cut and cut": (
        conv("x", "a", 32) + cut("a", "u v") + cut("u", "p q") + conv("p", "b") + conv("q", "c") + conv("v", "e") + add("b c", "f") + add("e f", "z"),
        {"cut a": (ALL, ALL), "cut u": (NONE, NONE)},
    ),
    "cut and cut beside what goes nowhere": (
        conv("x", "a", 32) + cut("a", "u v") + layer("Silence", "silence", "v", "") + cut("u", "p q") + conv("p", "b") + conv("q", "c") + add("b c", "z"),
        {"cut a": (FIRST, FIRST), "cut u": (NONE, NONE)},
    ),
    "cut and changed": (
        conv("x", "a") + cut("a", "u v") + relu("v") + conv("u", "b") + conv("v", "c") + add("b c", "z"),
        {"cut a": (FIRST, FIRST)},
    ),
    "cut from what is needed": (
        conv("x", "a") + layer("Sigmoid", "g", "a", "c") + cut("c", "u v") + conv("u", "b") + conv("v", "e") + add("b e", "z"),
        {"cut c": (ALL, ALL)},
    ),
    "joined along the batch and then cut": (
        conv("x", "a") + conv("x", "b") + layer("Concat", "join j", "a b", "j", "concat_param { axis: 0 }")
        + layer("Slice", "cut j", "j", "m n", "slice_param { axis: 0 }") + add("m n", "k") + cut("k", "u v") + conv("u", "c") + conv("v", "e")
        + add("c e", "z"),
        {"cut k": (ALL, ALL)},
    ),
}  # fmt: skip
LOSS = layer("InnerProduct", "ip", "z", "ip", 'inner_product_param { num_output: 8 weight_filler { type: "xavier" } }')
LOSS += layer("SoftmaxWithLoss", "loss", "ip t", "loss")


def shared(text: str, backend: Backend | None, compute: str = "float32") -> Graph:
    graph = build_graph(net_from_text(DATA + text + LOSS), phase=pb.TRAIN, compute=compute)
    fuse(graph, backend)
    return graph


def held(graph: Graph) -> Held:
    return {node.name: (node.layer.held_data, node.layer.held_diffs) for node in graph.nodes}


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NETS)
def test_what_lies_inside_others(name: str, compute: str) -> None:
    text, want = NETS[name]
    found = held(shared(text, backends.counting(), compute))
    assert {layer: found[layer] for layer in want} == want


@pytest.mark.parametrize(("compute", "want"), [("float32", (ALL, ALL)), ("bfloat16", (NONE, NONE))])
def test_parts_are_whole_pieces(compute: str, want: tuple[frozenset[int], frozenset[int]]) -> None:
    text = conv("x", "a", 4) + conv("x", "b", 4) + join("a b", "j") + conv("j", "z", 8)
    assert held(shared(text, backends.counting(), compute))["join j"] == want


def test_no_part_is_laid_where_no_op_takes_gaps(reference: Backend) -> None:
    for backend in (reference, None):
        assert held(shared(NETS["a fire"][0], backend))["join j"] == (NONE, NONE)


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("name", ["a fire", "a fire that is pooled"])
def test_a_fire_copies_nothing(cuda: Backend, monkeypatch: pytest.MonkeyPatch, name: str, precision: str) -> None:
    """Concat starts no kernel, nor do the ReLUs, and convolutions copy nothing. With gaps refused, Concat copies each part, both ways."""
    launch: Any = type(cuda).launch
    launched: list[tuple[str, str]] = []
    running = [""]

    def told(self: Backend, module: Any, kernel: str, *args: Any, **options: Any) -> None:
        launched.append((running[0], kernel.split("_")[0]))
        launch(self, module, kernel, *args, **options)

    monkeypatch.setattr(type(cuda), "launch", told)
    for taken, copies in ((cuda.takes_gaps, []), (frozenset[str](), ["copy"] * 2)):
        monkeypatch.setattr(type(cuda), "takes_gaps", taken)
        net = Net(net_from_text(DATA + NETS[name][0] + LOSS), phase=pb.TRAIN, backend=cuda, precision=precision)
        for hooks in (net.hooks.before_forward, net.hooks.before_backward):
            hooks.append(lambda index, net=net: running.__setitem__(0, net.layer_names[index]))
        net.forward()
        for run in (net.forward, net.backward):
            launched.clear()
            run()
            assert [kernel for layer, kernel in launched if layer == "join j"] == copies
            assert not [kernel for layer, kernel in launched if layer.startswith("relu")]
            assert {kernel for layer, kernel in launched if layer in ("to a", "to b")} <= {"gemm", "mma"}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_is_the_same_with_gaps_and_without(cuda: Backend, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """Recorded and played back, with tests in between."""
    trained = []
    for taken in (cuda.takes_gaps, frozenset[str]()):
        monkeypatch.setattr(type(cuda), "takes_gaps", taken)
        settings = 'base_lr: 0.05 lr_policy: "fixed" momentum: 0.9 weight_decay: 0.001 display: 0 test_interval: 3 test_iter: 1'
        solver = make_solver(settings, DATA + FIRE + POOL + LOSS, cuda, precision=precision)
        assert held(solver.net.graph)["join j"] == ((ALL, ALL) if taken else (NONE, NONE))
        solver.step(5)
        trained.append(weights_of(solver))
        solver.close()
    assert trained[0].keys() == trained[1].keys()
    for label, values in trained[1].items():
        assert np.isfinite(values).all()
        np.testing.assert_array_equal(trained[0][label], values, err_msg=label)


def test_memory_of_parts_is_that_of_the_whole() -> None:
    counting = backends.counting()
    graph = shared(NETS["a fire"][0], counting)
    plan, steps = plan_memory(graph, counting, backward=True), {node.name: i for i, node in enumerate(graph.nodes)}
    end = 2 * len(steps) - 1
    assert not {(what, blob) for what in ("data", "diff") for blob in "ab"} & plan.by_key.keys()
    whole, gradient = plan.by_key["data", "j"], plan.by_key["diff", "j"]
    assert whole.shape == gradient.shape == (3, 40, 5, 7)
    assert (whole.first, whole.last) == (steps["to a"], end - steps["to z"])
    assert (gradient.first, gradient.last) == (end - steps["to z"], end - steps["to a"])


def test_parts_meet_in_their_channels_alone() -> None:
    """Of a blob (2,5,3,1), whose pixels lie five apart, at the 10th element of another; against a list of their elements."""
    whole = BlobInfo("w", (2, 5, 3, 1), "float32")
    shapes = [(2, channels, 3, 1) for channels in (1, 2, 3)]
    places = [(Place.of(shape, 10 + start, whole), start, shape[1]) for shape in shapes for start in range(6 - shape[1])]
    elements = [{10 + start + c + 5 * pixel for pixel in range(6) for c in range(channels)} for _, start, channels in places]
    for (one, *_), ones in zip(places, elements):
        for (other, *_), others in zip(places, elements):
            assert one.meets(other) == bool(ones & others)
        for start, size in product(range(8, 45), (1, 2, 7)):  # an unbroken run: said to meet it from its first to its last element
            run = Place.of((size,), start, None)
            assert run.meets(one) == one.meets(run) == (start <= max(ones) and start + size > min(ones))
            assert run.meets(Place.of((3,), 20, None)) == (start < 23 and start + size > 20)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NETS)
def test_no_bit_changes(backend: Backend, name: str, precision: str) -> None:
    """Loss and gradients of three passes, over memory full of NaN."""
    results = []
    for observe in (False, True):
        net = Net(net_from_text(DATA + NETS[name][0] + LOSS), phase=pb.TRAIN, backend=backend, precision=precision, observe=observe, seed=5)
        for count in range(3):
            backend.fill(net.shared_buffer, 0xFF)
            net.context.forward_count = count
            net.zero_grads()
            net.forward()
            net.backward()
        results.append([np.float32(net.loss()), *(np.array(backend.to_host(p.diff)) for p in net.learnable)])
    assert max(np.abs(want).max() for want in results[1]) > 0
    for got, want in zip(*results):
        np.testing.assert_array_equal(got, want)
