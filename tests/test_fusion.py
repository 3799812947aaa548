"""Fused layers: what is fused and what is not, and that a fused net computes what the same net computes layer by layer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from caffelite import backends
from caffelite.fusion import fuse
from caffelite.graph import Graph, Node, build_graph
from caffelite.memory import plan_memory
from caffelite.net import Net
from caffelite.schema import net_from_text, pb

DATA = """layer { name: "d" type: "DummyData" top: "x" top: "t" dummy_data_param { shape { dim: 3 dim: 3 dim: 11 dim: 7 } shape { dim: 3 }
  data_filler { type: "gaussian" std: 1 } data_filler { type: "constant" value: 2 } } }
"""
LOSS = """layer { name: "ip" type: "InnerProduct" bottom: "z" top: "ip" inner_product_param { num_output: 5 weight_filler { type: "xavier" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "t" top: "loss" }
"""


def layer(kind: str, name: str, bottom: str, top: str, fields: str = "") -> str:
    return f'layer {{ name: "{name}" type: "{kind}" bottom: "{bottom}" top: "{top}" {fields} }}\n'


def conv(name: str, bottom: str, top: str, fields: str = "kernel_size: 3 pad: 1", outputs: int = 8) -> str:
    fillers = 'weight_filler { type: "msra" } bias_filler { type: "gaussian" std: 0.3 }'
    return layer("Convolution", name, bottom, top, f"convolution_param {{ num_output: {outputs} {fields} {fillers} }}")


def relu(blob: str, name: str = "relu", fields: str = "") -> str:
    return layer("ReLU", name, blob, blob, fields)


SUM = 'layer { name: "s" type: "Eltwise" bottom: "b" bottom: "h" top: "z" }\n'
# What takes the ReLU's top "a" and makes "z".
TAKERS = {
    "convolution": conv("c", "a", "z"),
    "convolution of one cell, two groups": conv("c", "a", "z", "kernel_size: 1 group: 2"),
    "inner product": layer("InnerProduct", "i", "a", "z", 'inner_product_param { num_output: 7 weight_filler { type: "xavier" } }'),
    "inner product of rows": conv("g", "x", "a", "kernel_h: 11 kernel_w: 7")
    + relu("a")
    + layer("InnerProduct", "i", "a", "z", 'inner_product_param { num_output: 7 weight_filler { type: "xavier" } }'),
    "max pooling": layer("Pooling", "p", "a", "z", "pooling_param { kernel_size: 3 stride: 2 }"),
    "max pooling and dropout": layer("Pooling", "p", "a", "z", "pooling_param { kernel_size: 3 stride: 2 }") + layer("Dropout", "q", "z", "z"),
    "average pooling": layer("Pooling", "p", "a", "z", "pooling_param { pool: AVE kernel_size: 3 stride: 2 }"),
    "normalisation across": layer("LRN", "n", "a", "z"),
    "normalisation within": layer("LRN", "n", "a", "z", "lrn_param { norm_region: WITHIN_CHANNEL local_size: 3 }"),
    "dropout in place": layer("Dropout", "q", "a", "a") + conv("c", "a", "z"),
    "dropout": layer("Dropout", "q", "a", "z"),
    "two layers, by way of a split": conv("c", "a", "b") + conv("e", "a", "h") + SUM,
    "a residual": layer("Convolution", "c", "a", "b", "convolution_param { num_output: 8 kernel_size: 1 }") + SUM.replace('"h"', '"a"') + relu("z", "over"),
}
FIRST = conv("first", "x", "a") + relu("a")


def text_of(name: str) -> str:
    taker = TAKERS[name]
    return DATA + ("" if 'top: "a" convolution_param' in taker else FIRST) + taker + LOSS


def fused(text: str, phase: int = pb.TRAIN, compute: str = "float32") -> Graph:
    graph = build_graph(net_from_text(text), phase=phase, compute=compute)
    fuse(graph)
    return graph


def skipped(graph: Graph) -> list[str]:
    """The layers whose backward another layer does."""
    return [node.name for node in graph.nodes if node.backward_fused]


def gradients(backend, text: str, precision: str, observe: bool) -> list[np.ndarray]:
    """The loss and all parameter gradients of the third of three passes, and the values of all parameters."""
    net = Net(net_from_text(text), phase=pb.TRAIN, backend=backend, precision=precision, observe=observe, seed=5)
    assert observe == (not skipped(net.graph))
    for count in range(3):
        net.context.forward_count = count
        net.zero_grads()
        net.forward()
        net.backward()
    learned = [np.array(backend.to_host(p.diff)) for p in net.learnable if p.lr_mult]
    return [np.float32(net.loss()), *learned, *(np.array(backend.to_host(p.master)) for p in net.learnable)]


# --- a ReLU's backward -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TAKERS)
def test_a_relu_taken_by_the_next_layer_changes_no_bit(backend, name: str, precision: str) -> None:
    ours, theirs = (gradients(backend, text_of(name), precision, observe) for observe in (False, True))
    assert len(ours) >= 1 + 2 * 4
    assert np.abs(theirs[1]).max() > 0
    for got, want in zip(ours, theirs):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", TAKERS)
def test_the_next_layer_takes_the_relu(name: str) -> None:
    graph = fused(text_of(name))
    assert skipped(graph)[0] == "relu"
    assert [node.name for node in graph.nodes if node.forward_fused] == ["relu", "over"][: 2 if name == "a residual" else 1]


NOT_TAKEN = {
    "a slope": conv("first", "x", "a") + relu("a", fields="relu_param { negative_slope: 0.1 }") + conv("c", "a", "z"),
    "a top of its own": conv("first", "x", "b") + layer("ReLU", "relu", "b", "a") + conv("c", "a", "z"),
    "a layer that does not": FIRST + layer("TanH", "h", "a", "z"),
    "no gradient comes back": FIRST + conv("c", "a", "z").replace("top:", "propagate_down: false top:"),
    "no layer below learns": relu("x") + conv("c", "x", "z"),
    "the pooled values are overwritten": FIRST + layer("Pooling", "p", "a", "z", "pooling_param { kernel_size: 3 }") + layer("BatchNorm", "n", "z", "z"),
    "dropout that drops nothing": FIRST + layer("Dropout", "q", "a", "a", "phase: TEST") + conv("c", "a", "z"),
    "values that pass through a buffer": FIRST + conv("c", "a", "z", "kernel_size: 3 axis: 2"),
}


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_no_other_relu_is_taken(name: str) -> None:
    graph = fused(DATA + NOT_TAKEN[name] + LOSS)
    assert skipped(graph) == []
    assert not any(node.layer.relu_bottoms for node in graph.nodes)


def test_a_relu_of_several_is_taken_by_its_own_taker() -> None:
    two = 'layer { name: "c" type: "Convolution" bottom: "x" bottom: "a" top: "y" top: "z" convolution_param { num_output: 3 kernel_size: 1 } }\n'
    text = DATA + conv("first", "x", "a", outputs=3) + relu("a") + two + LOSS
    graph = fused(text)
    assert skipped(graph) == ["relu"]
    assert graph.nodes[-3].layer.relu_bottoms == {1}


# --- the backward of ReLUs whose tops are joined -----------------------------------------------------------------------------

JOIN = 'layer { name: "j" type: "Concat" bottom: "m" bottom: "n" top: "a" }\n'
TWO = conv("first", "x", "m", outputs=3) + relu("m", "relu m") + conv("second", "x", "n", outputs=5) + relu("n", "relu n")
JOINED = {name: TWO + JOIN + taker for name, taker in TAKERS.items() if 'top: "a" convolution_param' not in taker}
NOT_JOINED = {
    "one has none": TWO.replace(relu("n", "relu n"), "") + JOIN + conv("c", "a", "z"),
    "one has a slope": TWO.replace(relu("n", "relu n"), relu("n", "relu n", "relu_param { negative_slope: 0.1 }")) + JOIN + conv("c", "a", "z"),
    "a layer that does not": TWO + JOIN + layer("TanH", "h", "a", "z"),
    "no gradient comes back": TWO + JOIN + conv("c", "a", "z").replace("top:", "propagate_down: false top:"),
    "no gradient goes to one": TWO + JOIN.replace("top:", "propagate_down: true propagate_down: false top:") + conv("c", "a", "z"),
}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", JOINED)
def test_relus_that_are_joined_change_no_bit(backend, name: str, precision: str) -> None:
    ours, theirs = (gradients(backend, DATA + JOINED[name] + LOSS, precision, observe) for observe in (False, True))
    assert np.abs(theirs[1]).max() > 0
    for got, want in zip(ours, theirs):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", JOINED)
def test_the_layer_after_takes_all_relus_that_are_joined(name: str) -> None:
    assert skipped(fused(DATA + JOINED[name] + LOSS))[:2] == ["relu m", "relu n"]


@pytest.mark.parametrize("name", NOT_JOINED)
def test_no_other_joined_relu_is_taken(name: str) -> None:
    graph = fused(DATA + NOT_JOINED[name] + LOSS)
    assert skipped(graph) == []
    assert not any(node.layer.relu_bottoms for node in graph.nodes)


def test_joined_relus_of_two_types_are_not_taken() -> None:
    """What is just above 0 in float32 may be 0 where it is joined, as bfloat16."""
    text = TWO.replace(conv("first", "x", "m", outputs=3), 'layer { name: "first" type: "Bias" bottom: "x" top: "m" }\n') + JOIN + conv("c", "a", "z")
    graphs = [fused(DATA + text + LOSS, compute=compute) for compute in ("float32", "bfloat16")]
    assert [graph.blobs["m"].dtype for graph in graphs] == ["float32", "float32"]
    assert list(map(skipped, graphs)) == [["relu m", "relu n"], []]


def test_a_joined_relu_that_is_used_elsewhere_is_taken_by_its_split_alone() -> None:
    graph = fused(DATA + TWO + JOIN + conv("c", "a", "b") + conv("e", "n", "h") + SUM + LOSS)
    assert skipped(graph) == ["relu n"]


def test_memory_of_a_pooled_relu_ends_with_forward(reference) -> None:
    """Max pooling's gradient needs its own top alone; the convolution's output is free again as soon as it is pooled."""
    text = text_of("max pooling and dropout")
    lives = []
    for fusing in (False, True):
        graph = fused(text) if fusing else build_graph(net_from_text(text), phase=pb.TRAIN)
        plan = plan_memory(graph, reference, backward=True)
        steps = {node.name: i for i, node in enumerate(graph.nodes)}
        last, end = plan.by_key["data", "a"].last, 2 * len(steps) - 1
        lives.append((last == steps["p"], last == end - steps["relu"], plan.by_key["data", "z"].last >= end - steps["p"]))
    assert lives == [(False, True, False), (True, False, True)]


def test_memory_of_what_average_pooling_reads_again(reference) -> None:
    graph = fused(text_of("average pooling"))
    steps = {node.name: i for i, node in enumerate(graph.nodes)}
    assert plan_memory(graph, reference, backward=True).by_key["data", "a"].last == 2 * len(steps) - 1 - steps["p"]


# --- LRN and max pooling -----------------------------------------------------------------------------------------------------

ALONG: Any = SimpleNamespace(drops_along=True, takes_gaps=frozenset(), lrn_max_pool_pays=lambda *args, **options: True)  # a backend that always had better
LRN, MAX = layer("LRN", "n", "a", "h"), layer("Pooling", "p", "h", "z", "pooling_param { kernel_size: 3 stride: 2 }")
ALEX = FIRST + LRN + MAX
POOLED = {
    "relu below": ALEX,
    "nothing below": conv("first", "x", "a") + LRN + MAX,
    "padded, dropout above": ALEX.replace("stride: 2", "stride: 2 pad: 1") + layer("Dropout", "q", "z", "z"),
    "a wide window": ALEX.replace("kernel_size: 3 stride: 2", "global_pooling: true"),
    "nothing learns below": layer("LRN", "n", "x", "h") + MAX,
}
NOT_POOLED = {
    "within a channel": ALEX.replace('top: "h" ', 'top: "h" lrn_param { norm_region: WITHIN_CHANNEL }'),
    "average": FIRST + LRN + MAX.replace("kernel_size", "pool: AVE kernel_size"),
    "used twice": FIRST
    + LRN
    + MAX.replace('"z"', '"y"')
    + layer("Pooling", "p2", "h", "u", "pooling_param { kernel_size: 3 stride: 2 }")
    + SUM.replace('"b"', '"y"').replace('"h"', '"u"'),
    "a weight": FIRST + LRN.replace('top: "h"', 'top: "h" loss_weight: 0.1') + MAX,
    "no gradient comes back": FIRST + LRN + MAX.replace("pooling_param", "propagate_down: false pooling_param"),
}


DROP, DEEP = (
    layer("Dropout", "q", "z", "z", "dropout_param { dropout_ratio: 0.3 }"),
    layer("Pooling", "p", "a", "z", "pooling_param { kernel_size: 3 stride: 2 }"),
)
MEAN = DEEP.replace("kernel_size", "pool: AVE kernel_size")
DROPPED = {
    "max": FIRST + DEEP + DROP,
    "average": FIRST + MEAN + DROP,
    "max, no relu": conv("first", "x", "a") + DEEP + DROP,
    "a relu above": FIRST + DEEP + DROP + relu("z", "over"),
    "another dropout above": FIRST + MEAN + DROP + layer("Dropout", "q2", "z", "z"),
    "global average": FIRST + MEAN.replace("kernel_size: 3 stride: 2", "global_pooling: true") + DROP,
    "nothing learns below, max": DEEP.replace('"a"', '"x"') + DROP,
    "nothing learns below, average": MEAN.replace('"a"', '"x"') + DROP,
}
NOT_DROPPED = {
    "a top of its own": FIRST + DEEP.replace('"z"', '"y"') + layer("Dropout", "q", "y", "z"),
    "nothing drops": FIRST + DEEP + DROP.replace("dropout_param", "phase: TEST dropout_param"),
    "a relu between": FIRST + DEEP + relu("z", "over") + DROP,
    "indices": FIRST + DEEP.replace('top: "z"', 'top: "z" top: "w"') + DROP + layer("Silence", "s", "w", "").replace('top: ""', ""),
    "normalised before": ALEX + DROP,
}
CHAINS = POOLED | NOT_POOLED | {f"dropout: {name}": text for name, text in (DROPPED | NOT_DROPPED).items()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CHAINS)
def test_pooling_that_does_more_changes_no_bit(backend, monkeypatch, name: str, precision: str) -> None:
    """On every backend: those that had better do one after the other can do both."""
    monkeypatch.setattr(type(backend), "drops_along", True)
    monkeypatch.setattr(type(backend), "lrn_max_pool_pays", ALONG.lrn_max_pool_pays)
    text = DATA + CHAINS[name] + LOSS
    results = []
    for observe in (False, True):
        net = Net(net_from_text(text), phase=pb.TRAIN, backend=backend, precision=precision, observe=observe, seed=5)
        for count in range(2):
            backend.fill(net.shared_buffer, 0xFF)
            net.context.forward_count = count
            net.zero_grads()
            net.forward()
            net.backward()
        results.append([np.float32(net.loss()), *(np.array(backend.to_host(p.diff)) for p in net.learnable)])
        assert net.first_nonfinite() is None
    assert max(np.abs(values).max() for values in results[1][1:]) > 0
    for got, want in zip(*results):
        np.testing.assert_array_equal(got, want)


def pooled(text: str, backend: Any = ALONG) -> dict[str, Node]:
    graph = build_graph(net_from_text(DATA + text + LOSS), phase=pb.TRAIN)
    fuse(graph, backend)
    return {node.name: node for node in graph.nodes}


@pytest.mark.parametrize("name", POOLED)
def test_max_pooling_normalises(name: str) -> None:
    nodes = pooled(POOLED[name])
    norm, pool = nodes["n"], nodes["p"]
    assert (norm.forward_fused, norm.backward_fused, norm.tops[0].absent) == (True, True, True)
    assert pool.layer.lrn is norm.layer
    assert pool.bottoms == norm.bottoms
    if "relu" in nodes:
        assert nodes["relu"].backward_fused
        assert pool.layer.relu_bottoms == {0}


@pytest.mark.parametrize("name", NOT_POOLED)
def test_no_other_lrn_is_part_of_pooling(name: str) -> None:
    nodes = pooled(NOT_POOLED[name])
    assert not any(node.layer.lrn for node in nodes.values() if node.layer.type == "Pooling")
    assert not nodes["n"].forward_fused


def test_pooling_normalises_only_where_the_backend_wants_it() -> None:
    assert pooled(ALEX, backends.get("numpy"))["p"].layer.lrn is None


@pytest.mark.parametrize("name", DROPPED)
def test_pooling_drops(name: str) -> None:
    nodes = pooled(DROPPED[name])
    assert nodes["p"].layer.dropout is nodes["q"].layer
    assert (nodes["q"].forward_fused, nodes["q"].backward_fused) == (True, True)
    if "relu" in nodes:
        assert nodes["p"].layer.relu_bottoms == {0}
    assert pooled(DROPPED[name], backends.get("numpy"))["p"].layer.dropout is None


@pytest.mark.parametrize("name", NOT_DROPPED)
def test_no_other_dropout_is_part_of_pooling(name: str) -> None:
    nodes = pooled(NOT_DROPPED[name])
    assert nodes["p"].layer.dropout is None
    assert not nodes["q"].forward_fused


def test_pooling_keeps_no_mask_of_dropout_but_for_averages(reference) -> None:
    for name, kept in (("max", ["p"]), ("average", ["p"]), ("nothing learns below, average", [])):
        graph = build_graph(net_from_text(DATA + DROPPED[name] + LOSS), phase=pb.TRAIN)
        fuse(graph, ALONG)
        plan = plan_memory(graph, reference, backward=True)
        assert [region.key[1] for region in plan.regions if region.dtype == "uint8"] == kept


# --- products and dropout ----------------------------------------------------------------------------------------------------


def product(name: str, bottom: str, top: str, fields: str = "", more: str = "") -> str:
    fillers = 'weight_filler { type: "xavier" } bias_filler { type: "gaussian" std: 0.3 }'
    return layer("InnerProduct", name, bottom, top, f"inner_product_param {{ num_output: 37 {fields} {fillers} }} {more}")


def drop(blob: str, name: str = "q", fields: str = "dropout_param { dropout_ratio: 0.3 }") -> str:
    return layer("Dropout", name, blob, blob, fields)


def several(name: str, bottoms: str, tops: str, more: str = "") -> str:
    """A convolution of as many bottoms as tops."""
    names = " ".join([f'bottom: "{b}"' for b in bottoms.split()] + [f'top: "{t}"' for t in tops.split()])
    fillers = 'weight_filler { type: "msra" } bias_filler { type: "gaussian" std: 0.3 }'
    return f'layer {{ name: "{name}" type: "Convolution" {names} {more} convolution_param {{ num_output: 8 kernel_size: 3 pad: 1 {fillers} }} }}\n'


FROZEN = "param { lr_mult: 0 } param { lr_mult: 0 }"
HALF = "dropout_param { dropout_ratio: 0.5 }"
PAIR = several("c", "e a b", "f g h") + 'layer { name: "s" type: "Eltwise" bottom: "f" bottom: "g" bottom: "h" top: "z" }\n'
ONE = 'param { name: "w" } param { name: "b" }'
TWICE = product("k", "a", "b", more=ONE) + relu("b", "r2") + drop("b", "q2", HALF) + product("l", "b", "z", more=ONE)
ENDING = product("i", "x", "a") + relu("a") + drop("a") + product("j", "a", "z")
PRODUCTS = {  # and the layers whose dropout their products do
    "inner products": (ENDING + relu("z", "over") + drop("z", "q2"), ["i", "j"]),
    "no bias": (ENDING.replace("num_output", "bias_term: false num_output"), ["i"]),
    "transposed": (ENDING.replace("num_output", "transpose: true num_output"), ["i"]),
    "convolutions": (conv("i", "x", "a") + relu("a") + drop("a") + conv("c", "a", "z", outputs=5) + relu("z", "over") + drop("z", "q2"), ["i", "c"]),
    "a stride and groups": (conv("i", "x", "a") + relu("a") + drop("a") + conv("c", "a", "z", "kernel_size: 3 stride: 2 group: 2"), ["i"]),
    "a convolution, then rows": (conv("i", "x", "a", outputs=5) + relu("a") + drop("a") + product("j", "a", "z"), ["i"]),
    "rows of a convolution": (conv("i", "x", "a", "kernel_h: 11 kernel_w: 7", outputs=21) + relu("a") + drop("a") + product("j", "a", "z"), ["i"]),
    "frozen, no relu": (product("i", "x", "a", more=FROZEN) + drop("a") + product("j", "a", "z"), ["i"]),
    "frozen, relu": (product("i", "x", "a", more=FROZEN) + relu("a") + drop("a") + product("j", "a", "z"), ["i"]),
    "no relu": (product("i", "x", "a") + drop("a") + product("j", "a", "z"), []),
    "a slope": (product("i", "x", "a") + relu("a", fields="relu_param { negative_slope: 0.1 }") + drop("a") + product("j", "a", "z"), []),
    "a relu after": (product("i", "x", "a") + drop("a") + relu("a") + product("j", "a", "z"), []),
    "a top of its own": (product("i", "x", "b") + relu("b") + layer("Dropout", "q", "b", "a") + product("j", "a", "z"), []),
    "two takers": (product("i", "x", "a") + relu("a") + drop("a") + product("j", "a", "b") + product("k", "a", "h") + SUM, []),
    "another taker": (conv("i", "x", "a") + relu("a") + drop("a") + DEEP, []),
    "another dropout": (product("i", "x", "a") + relu("a") + drop("a") + drop("a", "q2") + product("j", "a", "z"), []),
    "nothing drops": (ENDING.replace("dropout_param", "phase: TEST dropout_param"), []),
    "several bottoms": (
        conv("i", "x", "a") + relu("a") + drop("a") + conv("k", "x", "b") + relu("b", "r2") + drop("b", "q2", HALF) + conv("l", "x", "e") + PAIR,
        ["i", "k"],
    ),
    "several tops, frozen": (several("i", "x x", "a h", FROZEN) + drop("a") + drop("h", "q2", HALF) + SUM.replace('"b"', '"a"'), []),
    "weights of two": (product("i", "x", "e") + product("j", "e", "a", more=ONE) + relu("a") + drop("a") + TWICE, ["j", "k"]),
    "rows in another order": (product("i", "x", "a", "axis: 3") + relu("a") + drop("a") + product("j", "a", "z"), []),
}


def products(text: str, backend: Any = ALONG) -> list[str]:
    """The layers that do a dropout."""
    graph = build_graph(net_from_text(DATA + text + LOSS), phase=pb.TRAIN)
    fuse(graph, backend)
    fused = [node for node in graph.nodes if getattr(node.layer, "dropout", None) and node.layer.type != "Pooling"]
    assert [node.layer.dropout.name for node in fused] == [node.name for node in graph.nodes if node.layer.type == "Dropout" and node.forward_fused]
    assert all(node.forward_fused == node.backward_fused for node in graph.nodes if node.layer.type == "Dropout")
    return [node.name for node in fused]


@pytest.mark.parametrize("name", PRODUCTS)
def test_which_products_drop(name: str) -> None:
    text, found = PRODUCTS[name]
    assert products(text) == found
    assert products(text, backends.get("numpy")) == []
    graph = build_graph(net_from_text(DATA + text + LOSS), phase=pb.TEST)
    fuse(graph, ALONG)
    assert not any(getattr(node.layer, "dropout", None) or node.layer.drop_ratios for node in graph.nodes)


def passes(backend: Any, text: str, precision: str, observe: bool) -> list[np.ndarray]:
    """The loss and all parameter gradients of two passes, memory having held rubbish."""
    net, found = Net(net_from_text(text), phase=pb.TRAIN, backend=backend, precision=precision, observe=observe, seed=5), []
    for count in range(2):
        if not observe:
            backend.fill(net.shared_buffer, 0xFF)
        net.context.forward_count = count
        net.zero_grads()
        net.forward()
        net.backward()
        found += [np.float32(net.loss()), *(np.array(backend.to_host(p.diff)) for p in net.learnable)]
    return found


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_that_drop_change_no_bit(backend, monkeypatch, name: str, precision: str) -> None:
    monkeypatch.setattr(type(backend), "drops_along", True)
    fused, plain = (passes(backend, DATA + PRODUCTS[name][0] + LOSS, precision, observe) for observe in (False, True))
    assert min(np.abs(values).max() for values in plain if np.ndim(values)) > 0 or "frozen" in name
    for got, want in zip(fused, plain):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", ["inner products", "convolutions", "a convolution, then rows"])
def test_products_that_drop_change_no_bit_in_tf32(cuda, name: str) -> None:
    fused, plain = (passes(cuda, DATA + PRODUCTS[name][0] + LOSS, "tf32", observe) for observe in (False, True))
    for got, want in zip(fused, plain):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", ["inner products", "convolutions"])
def test_products_drop_what_the_reference_drops(backend, reference, monkeypatch, name: str) -> None:
    """And what is left has its values."""
    monkeypatch.setattr(type(backend), "drops_along", True)
    tops = []
    for ops, observe in ((backend, False), (reference, True)):
        net = Net(net_from_text(DATA + PRODUCTS[name][0] + LOSS), phase=pb.TRAIN, backend=ops, observe=observe, seed=5)
        net.forward()
        tops.append(np.array(ops.to_host(net.blobs["a"].data)))  # kept for backward
    assert 0.2 < (tops[1] > 0).mean() < 0.6
    np.testing.assert_array_equal(tops[0] > 0, tops[1] > 0)
    np.testing.assert_allclose(tops[0], tops[1], rtol=1e-4, atol=1e-5)


def test_products_keep_no_mask_of_dropout(reference) -> None:
    for name, kept in (("inner products", []), ("convolutions", []), ("no relu", ["q"])):
        graph = build_graph(net_from_text(DATA + PRODUCTS[name][0] + LOSS), phase=pb.TRAIN)
        fuse(graph, ALONG)
        assert [region.key[1] for region in plan_memory(graph, reference, backward=True).regions if region.dtype == "uint8"] == kept


def test_what_pooling_normalises_lies_nowhere(reference) -> None:
    graph = build_graph(net_from_text(DATA + ALEX + LOSS), phase=pb.TRAIN)
    fuse(graph, ALONG)
    plan, steps = plan_memory(graph, reference, backward=True), {node.name: i for i, node in enumerate(graph.nodes)}
    assert not [region for region in plan.regions if region.key[1] in ("h", "n")]
    assert plan.by_key["data", "a"].last == 2 * len(steps) - 1 - steps["p"]


# --- BatchNorm, Scale and ReLU -----------------------------------------------------------------------------------------------


def norm(blob: str, top: str | None = None, fields: str = "batch_norm_param { moving_average_fraction: 0.9 }") -> str:
    return layer("BatchNorm", "norm", blob, top or blob, fields)


def scale(blob: str, fields: str = "", more: str = "") -> str:
    fillers = 'filler { type: "gaussian" std: 1 } bias_filler { type: "gaussian" std: 0.5 }'
    return layer("Scale", "scale", blob, blob, f"scale_param {{ bias_term: true {fillers} {fields} }} {more}")


PLAIN = conv("first", "x", "a", outputs=16)
NORMED = {
    "in place, relu, convolution": PLAIN + norm("a") + scale("a") + relu("a") + conv("c", "a", "z"),
    "in place, relu, max pooling": PLAIN + norm("a") + scale("a") + relu("a") + layer("Pooling", "p", "a", "z", "pooling_param { kernel_size: 3 stride: 2 }"),
    "in place, dropout": PLAIN + norm("a") + scale("a") + layer("Dropout", "q", "a", "a") + conv("c", "a", "z"),
    "after a bias in place": PLAIN + layer("Bias", "below", "a", "a") + norm("a") + scale("a") + relu("a") + conv("c", "a", "z"),
    "a top of its own": PLAIN + norm("a", "h") + scale("h") + relu("h") + conv("c", "h", "z"),
    "five channels": conv("first", "x", "a", outputs=5) + norm("a") + scale("a") + relu("a") + conv("c", "a", "z"),
    "global statistics": PLAIN + norm("a", fields="batch_norm_param { use_global_stats: true }") + scale("a") + relu("a") + conv("c", "a", "z"),
    "bias alone learned": PLAIN + norm("a") + scale("a", more="param { lr_mult: 0 } param { lr_mult: 1 }") + relu("a") + conv("c", "a", "z"),
    "rows": layer("InnerProduct", "i", "x", "a", 'inner_product_param { num_output: 7 weight_filler { type: "xavier" } }')
    + norm("a")
    + scale("a")
    + layer("TanH", "t2", "a", "z"),
    "used twice": PLAIN + norm("a") + scale("a") + relu("a") + conv("c", "a", "u") + 'layer { name: "s" type: "Eltwise" bottom: "u" bottom: "v" top: "z" }\n',
}
NORMED["used twice"] = NORMED["used twice"].replace('bottom: "v"', 'bottom: "w"').replace('layer { name: "s"', conv("e", "a", "w") + 'layer { name: "s"')


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NORMED)
def test_a_normalised_net_computes_what_its_layers_do(backend, name: str, precision: str) -> None:
    """float32: sums in other orders, 2e-5 of the largest gradient. bfloat16: the unfused layers round the normalised values as well."""
    ours, theirs = (gradients(backend, DATA + NORMED[name] + LOSS, precision, observe) for observe in (False, True))
    assert len(ours) == len(theirs) >= 9
    largest = max(np.abs(want).max() for want in theirs)  # not of each array: a normalised bias has no gradient but rounding
    for got, want in zip(ours, theirs):
        np.testing.assert_allclose(got, want, rtol=0, atol=(2e-5 if precision == "float32" else 0.02) * largest)


@pytest.mark.parametrize("name", NORMED)
def test_scale_and_relu_are_part_of_batch_norm(name: str) -> None:
    graph = fused(DATA + NORMED[name] + LOSS)
    nodes = {node.name: node for node in graph.nodes}
    taken = ["scale", "relu"] if "relu" in nodes and "dropout" not in name else ["scale"]
    assert [node.name for node in nodes["norm"].absorbed] == taken
    assert nodes["norm"].layer.scale is nodes["scale"].layer
    assert nodes["norm"].layer.then_relu == (len(taken) == 2)
    assert all(nodes[n].forward_fused and nodes[n].backward_fused for n in taken)
    assert not nodes["norm"].in_place()


NOT_NORMED = {
    "scale without a bias": PLAIN + norm("a") + layer("Scale", "scale", "a", "a") + conv("c", "a", "z"),
    "scale of another axis": PLAIN + norm("a") + scale("a", "axis: 2") + conv("c", "a", "z"),
    "scale of two axes": PLAIN + norm("a") + scale("a", "num_axes: 2") + conv("c", "a", "z"),
    "a shared scale": PLAIN + norm("a") + scale("a", more='param { name: "s" }') + conv("c", "a", "z"),
    "scale by another blob": PLAIN + norm("a", "h") + 'layer { name: "scale" type: "Scale" bottom: "h" bottom: "x" top: "z" scale_param { axis: 0 } }\n',
    "nothing below learns": layer("Power", "w", "x", "a") + norm("a") + scale("a") + conv("c", "a", "z"),
    "something between": PLAIN + norm("a") + layer("Dropout", "q", "a", "a") + scale("a") + conv("c", "a", "z"),
}
NOT_NORMED["scale by another blob"] = NOT_NORMED["scale by another blob"].replace(PLAIN, conv("first", "x", "a", outputs=3))


@pytest.mark.parametrize("name", NOT_NORMED)
def test_no_other_scale_is_part_of_batch_norm(name: str) -> None:
    graph = fused(DATA + NOT_NORMED[name] + LOSS)
    assert not any(node.absorbed for node in graph.nodes)
    assert not any(node.forward_fused for node in graph.nodes)


def test_what_batch_norm_finds_in_place_has_memory_of_its_own(reference) -> None:
    graph = fused(DATA + NORMED["in place, relu, convolution"] + LOSS)
    plan = plan_memory(graph, reference, backward=True)
    steps, end = {node.name: i for i, node in enumerate(graph.nodes)}, 2 * len(graph.nodes) - 1
    kept, own = plan.by_key["data", "a before norm"], plan.by_key["data", "a"]
    assert (kept.first, kept.last) == (steps["first"], end - steps["norm"])
    assert (own.first, own.last) == (steps["norm"], end - steps["norm"])
    assert ("diff", "a before norm") not in plan.by_key
    diff = plan.by_key["diff", "a"]
    assert (diff.first, diff.last) == (end - steps["c"], end - steps["first"])
    assert [(node.name, node.tops[0].label, node.written_in_place()) for node in graph.nodes[1:4]] == [
        ("first", "a", False),
        ("norm", "a", True),
        ("scale", "a", True),
    ]
    assert not [region for region in plan.regions if region.key[1] in ("scale", "relu") or region.key[2:] == ("normalised",)]


def test_what_is_not_finite_is_named_as_in_the_file(reference) -> None:
    net = Net(net_from_text(DATA + NORMED["in place, relu, convolution"] + LOSS), phase=pb.TRAIN, backend=reference, seed=5)
    reference.fill(net.params["first"][0].master, 3e38)
    with np.errstate(all="ignore"):
        assert net.first_nonfinite() == "layer 'first' (Convolution): its top 'a' is not finite"


def test_a_net_that_is_only_tested_stays_in_place() -> None:
    graph = fused(DATA + NORMED["in place, relu, convolution"] + LOSS, phase=pb.TEST)
    node = next(node for node in graph.nodes if node.name == "norm")
    assert node.in_place()
    assert [n.name for n in node.absorbed] == ["scale", "relu"]
    assert "a before norm" not in graph.blobs


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["in place, relu, convolution", "a top of its own", "rows"])
def test_a_tested_net_computes_what_its_layers_do(backend, name: str, precision: str) -> None:
    train = Net(net_from_text(DATA + NORMED[name] + LOSS), phase=pb.TRAIN, backend=backend, precision=precision, seed=5)
    for _ in range(3):
        train.forward()
    losses = []
    for observe in (False, True):
        net = Net(net_from_text(DATA + NORMED[name] + LOSS), phase=pb.TEST, backend=backend, precision=precision, observe=observe, seed=5)
        net.copy_from(train.to_proto())
        net.forward()
        losses.append(net.loss())
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-6 if precision == "float32" else 0.02)
