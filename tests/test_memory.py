"""The memory plan: arrays that live at the same time never overlap, reuse changes no result, and it saves what it should."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from caffelite.graph import build_graph
from caffelite.memory import MemoryPlan, plan_memory
from caffelite.net import Net
from caffelite.schema import net_from_text, pb

NET = """
name: "small"
layer { name: "d" type: "DummyData" top: "x" top: "t" dummy_data_param { shape { dim: 4 dim: 3 dim: 12 dim: 12 } shape { dim: 4 }
  data_filler { type: "gaussian" std: 1 } data_filler { type: "constant" value: 2 } } }
layer { name: "c1" type: "Convolution" bottom: "x" top: "c1" convolution_param { num_output: 8 kernel_size: 3 pad: 1 weight_filler { type: "msra" } } }
layer { name: "r1" type: "ReLU" bottom: "c1" top: "c1" }
layer { name: "c2" type: "Convolution" bottom: "c1" top: "c2" convolution_param { num_output: 8 kernel_size: 1 weight_filler { type: "msra" } } }
layer { name: "n2" type: "LRN" bottom: "c2" top: "n2" }
layer { name: "p2" type: "Pooling" bottom: "n2" top: "p2" pooling_param { kernel_size: 3 stride: 2 } }
layer { name: "drop" type: "Dropout" bottom: "p2" top: "p2" }
layer { name: "b3" type: "BatchNorm" bottom: "p2" top: "b3" }
layer { name: "s3" type: "Scale" bottom: "b3" top: "b3" scale_param { bias_term: true } }
layer { name: "e" type: "Eltwise" bottom: "b3" bottom: "p2" top: "e" }
layer { name: "cc" type: "Concat" bottom: "e" bottom: "p2" top: "cc" }
layer { name: "ip" type: "InnerProduct" bottom: "cc" top: "ip" inner_product_param { num_output: 5 weight_filler { type: "xavier" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "t" top: "loss" }
layer { name: "acc" type: "Accuracy" bottom: "ip" bottom: "t" top: "acc" }
"""


@pytest.fixture
def numpy_backend():
    from caffelite import backends

    return backends.get("numpy")


def plan(backend, text: str = NET, phase: int = pb.TRAIN, **options) -> MemoryPlan:
    return plan_memory(build_graph(net_from_text(text), phase=phase), backend, backward=phase == pb.TRAIN, **options)


@pytest.mark.parametrize("phase", [pb.TRAIN, pb.TEST])
def test_regions_alive_together_never_overlap(numpy_backend, phase: int) -> None:
    regions = plan(numpy_backend, phase=phase).regions
    assert len(regions) > 10
    for a, b in itertools.combinations(regions, 2):
        if a.persistent == b.persistent and (a.persistent or (a.first <= b.last and b.first <= a.last)):
            assert a.offset + a.nbytes <= b.offset or b.offset + b.nbytes <= a.offset, (a.key, b.key)
    assert all(region.offset % 64 == 0 for region in regions)


def test_reuse_needs_less_than_half_of_a_deep_chain(numpy_backend) -> None:
    head, chain = NET.split('layer { name: "n2"')[0], ""
    for i, below in enumerate(["c2", *(f"k{i}" for i in range(9))]):
        chain += f'layer {{ name: "k{i}" type: "Convolution" bottom: "{below}" top: "k{i}" convolution_param {{ num_output: 8 kernel_size: 1 }} }}\n'
    planned = plan(numpy_backend, head + chain, phase=pb.TEST)
    assert planned.peak_bytes < planned.total_bytes / 2


def test_without_reuse_every_region_has_its_own_bytes(numpy_backend) -> None:
    planned = plan(numpy_backend, reuse=False)
    assert planned.shared_bytes == 0
    assert planned.persistent_bytes == planned.total_bytes


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_reuse_and_fusion_change_no_bit_of_the_gradients(backend, precision: str) -> None:
    text = NET.replace("bias_term: true", "bias_term: false")  # a Scale with a bias is part of BatchNorm, which rounds otherwise: test_fusion.py
    results = []
    for observe in (False, True):
        net = Net(net_from_text(text), phase=pb.TRAIN, backend=backend, precision=precision, observe=observe, seed=3)
        for count in range(3):
            net.context.forward_count = count
            net.zero_grads()
            net.forward()
            net.backward()
        results.append([net.loss(), *(np.array(backend.to_host(p.diff)) for p in net.learnable if p.lr_mult)])
    assert len(results[0]) == 8
    for ours, reference in zip(*results):
        np.testing.assert_array_equal(ours, reference)


KEEPERS = """
layer { name: "pool" type: "Pooling" bottom: "x" top: "p" pooling_param { kernel_size: 3 stride: 2 } }
layer { name: "where" type: "Pooling" bottom: "p" top: "q" top: "index" pooling_param { kernel_size: 2 } }
layer { name: "lrn" type: "LRN" bottom: "q" top: "n" }
layer { name: "k" type: "Convolution" bottom: "n" top: "k" convolution_param { num_output: 3 kernel_size: 1 weight_filler { type: "msra" } } }
layer { name: "scale" type: "Scale" bottom: "k" top: "k" scale_param { filler { value: 0.5 } } }
layer { name: "prelu" type: "PReLU" bottom: "k" top: "k" }
layer { name: "ip" type: "InnerProduct" bottom: "k" top: "ip" inner_product_param { num_output: 5 weight_filler { type: "xavier" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "t" top: "loss" }
layer { name: "silence" type: "Silence" bottom: "index" }
"""
HEAD = NET.split('layer { name: "c1"')[0].replace('type: "gaussian"', 'type: "gaussian" mean: 0.5').replace("dim: 3", "dim: 16")
BEFORE = 'layer { name: "c" type: "Convolution" bottom: "d" top: "x" convolution_param { num_output: 16 kernel_size: 1 weight_filler { type: "msra" } } }'


def kept_for_backward(regions) -> set[tuple[str, str]]:
    return {(r.key[1], r.key[2]) for r in regions if r.key[0] == "buffer"} & {
        ("pool", "mask"),
        ("where", "mask"),
        ("lrn", "work"),
        ("scale", "x"),
        ("prelu", "x"),
    }


def test_nothing_is_kept_for_a_backward_that_does_not_follow(backend) -> None:
    """In phase TEST, and below the first layer that learns. A top with the places of the maxima needs the mask all the same."""
    text = HEAD.replace('top: "x"', 'top: "d"', 1) + BEFORE + KEEPERS
    assert len(kept_for_backward(plan(backend, text).regions)) == 5
    assert kept_for_backward(plan(backend, text, phase=pb.TEST).regions) == {("where", "mask")}
    fixed = HEAD + KEEPERS  # nothing below the second convolution learns
    assert kept_for_backward(plan(backend, fixed).regions) == {("where", "mask"), ("scale", "x"), ("prelu", "x")}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_is_not_kept_changes_no_value(backend, precision: str) -> None:
    text = HEAD.replace('top: "x"', 'top: "d"', 1) + BEFORE + KEEPERS
    outputs = []
    for phase in (pb.TRAIN, pb.TEST):
        net = Net(net_from_text(text), phase=phase, backend=backend, precision=precision, seed=3)
        net.forward()
        outputs.append(net.output_values()["loss"])
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-6 if precision == "float32" else 1e-2)
