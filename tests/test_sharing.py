"""Blobs that lie inside others: which do, which must not, and that a net computes the same either way."""

from __future__ import annotations

import numpy as np
import pytest

from caffelite.backends.contract import Backend
from caffelite.fusion import fuse
from caffelite.graph import Graph, build_graph
from caffelite.memory import plan_memory
from caffelite.net import Net
from caffelite.schema import net_from_text, pb

# One image is 32 elements: 64 bytes in bfloat16, the boundary that regions begin at.
DATA = """layer { name: "d" type: "DummyData" top: "x" top: "t" dummy_data_param { shape { dim: 4 dim: 8 dim: 2 dim: 2 } shape { dim: 4 }
  data_filler { type: "gaussian" std: 1 } data_filler { type: "constant" value: 2 } } }
"""
ALL = frozenset({0, 1})
NONE: frozenset[int] = frozenset()
Held = dict[str, tuple[frozenset[int], frozenset[int]]]


def layer(kind: str, name: str, bottoms: str, tops: str, fields: str = "") -> str:
    names = " ".join([f'bottom: "{b}"' for b in bottoms.split()] + [f'top: "{t}"' for t in tops.split()])
    return f'layer {{ name: "{name}" type: "{kind}" {names} {fields} }}\n'


def conv(name: str, bottom: str, top: str) -> str:
    fillers = 'weight_filler { type: "msra" } bias_filler { type: "gaussian" std: 0.3 }'
    return layer("Convolution", name, bottom, top, f"convolution_param {{ num_output: 8 kernel_size: 1 {fillers} }}")


def join(bottoms: str, top: str) -> str:
    return layer("Concat", "join", bottoms, top, "concat_param { axis: 0 }")


def cut(bottom: str, tops: str, axis: int = 0) -> str:
    return layer("Slice", "cut", bottom, tops, f"slice_param {{ axis: {axis} }}")


def norm(blob: str) -> str:
    scale = 'scale_param { bias_term: true filler { type: "gaussian" std: 1 } }'
    return layer("BatchNorm", f"norm {blob}", blob, blob) + layer("Scale", f"scale {blob}", blob, blob, scale)


FIRST = conv("first", "x", "a")
TWO = FIRST + conv("second", "x", "b")
BACK = cut("j", "u v") + layer("Eltwise", "s", "u v", "z")  # from eight images to four
IP = 'inner_product_param { num_output: 8 weight_filler { type: "xavier" } }'
SHAPED = layer("InnerProduct", "i", "x", "a", IP) + layer("Reshape", "r", "a", "c", "reshape_param { shape { dim: 0 dim: 4 dim: 2 } }")
AGAIN = layer("Flatten", "f", "c", "z")
# What makes "z" out of "x", and what the layers hold of data and of gradients.
NETS: dict[str, tuple[str, Held]] = {
    "joined and cut": (TWO + join("a b", "j") + BACK, {"join": (ALL, ALL), "cut": (ALL, ALL)}),
    "in place before and after": (
        TWO + layer("ReLU", "r1", "a", "a") + join("a b", "j") + layer("ReLU", "r2", "j", "j") + BACK + layer("ReLU", "r3", "z", "z"),
        {"join": (ALL, ALL), "cut": (ALL, ALL)},
    ),
    "cut and joined": (FIRST + cut("a", "u v") + layer("ReLU", "r1", "v", "v") + join("u v", "z"), {"cut": (ALL, ALL), "join": (NONE, NONE)}),
    "cut and changed": (FIRST + cut("a", "u v") + layer("TanH", "h", "v", "v") + join("u v", "z"), {"cut": (ALL, ALL), "join": (NONE, NONE)}),
    "what is cut is needed as it was": (
        FIRST + layer("Sigmoid", "g", "a", "c") + cut("c", "u v") + layer("Dropout", "q", "v", "v") + join("u v", "z"),
        {"cut": (frozenset({0}), ALL), "join": (frozenset({1}), NONE)},
    ),
    "what is cut is needed by its sign": (
        FIRST + layer("ReLU", "g", "a", "c") + cut("c", "u v") + layer("Dropout", "q", "v", "v") + join("u v", "z"),
        {"cut": (ALL, ALL), "join": (NONE, NONE)},
    ),
    "what is joined is needed as it was": (
        TWO + layer("Sigmoid", "g", "a", "c") + join("c b", "j") + layer("ReLU", "r1", "j", "j") + BACK,
        {"join": (frozenset({1}), ALL), "cut": (ALL, ALL)},
    ),
    "used elsewhere": (
        FIRST
        + cut("a", "u v")
        + layer("Dropout", "q", "v", "v")
        + layer("Eltwise", "s", "u v", "w")
        + conv("c", "a", "k")
        + cut("k", "m n").replace("cut", "cut2")
        + layer("Eltwise", "s2", "m w", "y")
        + join("y n", "z"),
        {"cut": (frozenset({0}), ALL), "cut2": (ALL, ALL), "join": (frozenset({0}), frozenset({0}))},
    ),
    "what is cut is needed by its sign elsewhere too": (
        TWO
        + layer("ReLU", "g", "a", "c")
        + layer("Eltwise", "s", "c b", "y")
        + cut("c", "u v")
        + layer("Dropout", "q", "v", "v")
        + join("u v", "w")
        + layer("Eltwise", "s2", "y w", "z"),
        {"cut": (frozenset({0}), ALL), "join": (frozenset({1}), NONE)},
    ),
    "of a source": (join("x x", "j") + conv("c", "j", "k") + cut("k", "u v") + layer("Eltwise", "s", "u v", "z"), {"join": (NONE, NONE), "cut": (ALL, ALL)}),
    "along the channels": (
        TWO + layer("Concat", "join", "a b", "j") + cut("j", "u v", 1) + layer("Eltwise", "s", "u v", "z"),
        {"join": (NONE, NONE), "cut": (NONE, NONE)},
    ),
    "shaped and back": (SHAPED + AGAIN, {"r": (frozenset({0}), frozenset({0})), "f": (frozenset({0}), frozenset({0}))}),
    "shaped and changed": (SHAPED + layer("ReLU", "h", "c", "c") + AGAIN, {"r": (frozenset({0}), frozenset({0})), "f": (frozenset({0}), frozenset({0}))}),
    "shaped out of channels": (FIRST + layer("Flatten", "f", "a", "z"), {"f": (NONE, NONE)}),
    "a sum": (TWO + layer("Eltwise", "s", "a b", "z"), {"s": (NONE, ALL)}),
    "a sum with a coefficient": (TWO + layer("Eltwise", "s", "a b", "z", "eltwise_param { coeff: 1 coeff: -2 }"), {"s": (NONE, frozenset({0}))}),
    "a sum of what is changed in place": (TWO + layer("TanH", "h", "a", "a") + layer("Eltwise", "s", "a b", "z"), {"s": (NONE, frozenset({0}))}),
    "a sum of a sum": (
        TWO + layer("Eltwise", "s", "a b", "y") + conv("third", "x", "k") + layer("Eltwise", "s2", "y k", "z"),
        {"s": (NONE, ALL), "s2": (NONE, ALL)},
    ),
    "a sum of a sum of what is changed in place": (
        conv("third", "x", "k") + TWO + layer("TanH", "h", "a", "a") + layer("Eltwise", "s", "a b", "y") + layer("Eltwise", "s2", "y k", "z"),
        {"s": (NONE, frozenset({0})), "s2": (NONE, frozenset({0}))},
    ),
    "a residual": (
        FIRST + layer("ReLU", "r1", "a", "a") + conv("c", "a", "b") + layer("Eltwise", "s", "a b", "z") + layer("ReLU", "r2", "z", "z"),
        {"s": (NONE, ALL)},
    ),
    "a product": (TWO + layer("Eltwise", "s", "a b", "z", "eltwise_param { operation: PROD }"), {"s": (NONE, NONE)}),
    "normalised in place": (TWO + norm("a") + norm("b") + layer("Eltwise", "s", "a b", "z"), {"s": (NONE, ALL)}),
}
LOSS = layer("InnerProduct", "ip", "z", "ip", IP) + layer("SoftmaxWithLoss", "loss", "ip t", "loss")


def shared(text: str) -> Graph:
    graph = build_graph(net_from_text(DATA + text + LOSS), phase=pb.TRAIN)
    fuse(graph)
    return graph


@pytest.mark.parametrize("name", NETS)
def test_what_lies_inside_others(name: str) -> None:
    text, want = NETS[name]
    found = {node.name: (node.layer.held_data, node.layer.held_diffs) for node in shared(text).nodes}
    assert {layer: found[layer] for layer in want} == want


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NETS)
def test_no_bit_changes(backend: Backend, name: str, precision: str) -> None:
    """Loss and gradients of three passes, over memory full of NaN. A normalised net is held against its layers in test_fusion.py: here only itself."""
    results = []
    for observe in (False, True):
        net = Net(net_from_text(DATA + NETS[name][0] + LOSS), phase=pb.TRAIN, backend=backend, precision=precision, observe=observe, seed=5)
        for count in range(3):
            backend.fill(net.shared_buffer, 0xFF)
            net.context.forward_count = count
            net.zero_grads()
            net.forward()
            net.backward()
        results.append([np.float32(net.loss()), *(np.array(backend.to_host(p.diff)) for p in net.learnable if p.lr_mult)])
    largest = max(np.abs(want).max() for want in results[1])
    tolerance = largest * (2e-5 if precision == "float32" else 0.02) if "norm" in name else 0
    assert largest > 0
    for got, want in zip(*results):
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


def test_memory_of_parts_is_that_of_the_whole(reference: Backend) -> None:
    graph = shared(NETS["joined and cut"][0])
    plan, steps = plan_memory(graph, reference, backward=True), {node.name: i for i, node in enumerate(graph.nodes)}
    end = 2 * len(steps) - 1
    whole, gradient = plan.by_key["data", "j"], plan.by_key["diff", "z"]
    assert not {("data", name) for name in "abuv"} & plan.by_key.keys()
    assert not {("diff", name) for name in "abuv"} & plan.by_key.keys()
    assert whole.shape == (8, 8, 2, 2)
    assert (whole.first, whole.last) == (steps["first"], steps["s"])
    assert (gradient.first, gradient.last) == (end - steps["ip"], end - steps["s"])
    assert (plan.by_key["diff", "j"].first, plan.by_key["diff", "j"].last) == (end - steps["s"], end - steps["first"])


def test_a_watched_net_keeps_all_blobs_apart(reference: Backend) -> None:
    net = Net(net_from_text(DATA + NETS["joined and cut"][0] + LOSS), phase=pb.TRAIN, backend=reference, observe=True)
    assert not any(layer.held_data or layer.held_diffs for layer in net.layers)
    assert {("data", name) for name in "abjuvz"} <= net.memory.by_key.keys()
