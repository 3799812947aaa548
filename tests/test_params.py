"""The parameter arena: where everything lies, starting values, gradients and their sums, bfloat16 copies."""

from __future__ import annotations

import numpy as np
import pytest

from caffelite.backends.contract import Backend, Segment
from caffelite.errors import SpecError
from caffelite.graph import build_graph
from caffelite.params import ParamArena, initial_values
from caffelite.schema import array_to_blob, net_from_text, pb

NET = """
layer { name: "in" type: "Input" top: "x" input_param { shape { dim: 2 dim: 3 dim: 5 dim: 5 } } }
layer { name: "conv" type: "Convolution" bottom: "x" top: "conv" param { lr_mult: 2 decay_mult: 3 } param { name: "bias" lr_mult: 0.5 decay_mult: 0 }
  convolution_param { num_output: 7 kernel_size: 3 weight_filler { type: "gaussian" std: 2 } bias_filler { type: "uniform" } } }
layer { name: "bn" type: "BatchNorm" bottom: "conv" top: "conv" }
layer { name: "scale" type: "Scale" bottom: "conv" top: "conv" param { } param { name: "bias" } scale_param { bias_term: true } }
"""
LABELS = ["conv/0", "conv/1", "bn/0", "bn/1", "bn/2", "scale/0"]


def arena(backend: Backend, compute: str = "float32", gradients: bool = True) -> ParamArena:
    return ParamArena(backend, build_graph(net_from_text(NET), phase=pb.TRAIN).owners, compute=compute, gradients=gradients)


def test_one_flat_array_holds_all_owners_in_order(backend) -> None:
    a = arena(backend)
    assert a.labels == LABELS
    assert [p.shape for p in a.params] == [(7, 3, 3, 3), (7,), (7,), (7,), (1,), (7,)]
    assert [p.name for p in a.params] == ["conv/0", "bias", *LABELS[2:]]
    assert a.offsets == [0, 192, 208, 224, 240, 256]  # 189 values, then steps of 16: 64 bytes
    assert a.length == 272
    for i, param in enumerate(a.params):
        backend.fill(param.master, float(i + 1))
    flat = np.array(backend.to_host(a.master))
    assert flat.sum() == 189 + 7 * (2 + 3 + 4 + 6) + 5  # the gaps stay 0
    assert (flat[192:199] == 2).all()


def test_segments_carry_each_parameters_own_multiples(backend) -> None:
    assert arena(backend).segments(0.1)[:4] == [
        Segment(0, 189, 2.0, pytest.approx(0.3)),
        Segment(192, 199, 0.5, 0.0),
        Segment(208, 215, 0.0, 0.1),
        Segment(224, 231, 0.0, 0.1),
    ]


def test_a_convolutions_weight_lies_channels_last(backend) -> None:
    a, values = arena(backend), np.arange(189.0).reshape(7, 3, 3, 3)
    backend.from_host(values, a.params[0].master)
    np.testing.assert_array_equal(backend.to_host(a.master)[:189], values.transpose(0, 2, 3, 1).ravel())


def test_a_new_sum_overwrites_and_what_nobody_wrote_becomes_zero(backend) -> None:
    a = arena(backend)
    backend.fill(a.grad, 9.0)
    assert all(p.accumulate for p in a.params)
    a.zero_grads()
    assert not any(p.accumulate for p in a.params)
    a.params[0].accumulate = True  # as if a layer had written it
    a.settle_grads()
    assert all(p.accumulate for p in a.params)
    assert [float(backend.to_host(p.diff).max()) for p in a.params] == [9, 0, 0, 0, 0, 0]


def test_without_gradients_there_are_none(backend) -> None:
    a = arena(backend, gradients=False)
    assert a.grad is None
    assert all(p.diff is None for p in a.params)
    a.zero_grads()
    a.settle_grads()


def test_only_learned_matrices_have_a_bfloat16_copy_and_it_follows_the_master(backend) -> None:
    a = arena(backend, "bfloat16")
    assert [p.dtype for p in a.params] == ["bfloat16"] + ["float32"] * 5
    assert all(p.data is p.master for p in a.params[1:])
    weight, values = a.params[0], np.linspace(-3, 3, 189).reshape(7, 3, 3, 3)
    backend.from_host(values, weight.master)
    a.refresh()
    rounded = (np.float32(values).view(np.uint32) + 0x7FFF + ((np.float32(values).view(np.uint32) >> 16) & 1)) & 0xFFFF0000  # to nearest, ties to even
    np.testing.assert_array_equal(backend.to_host(weight.data), rounded.view(np.float32))
    backend.fill(weight.master, 1.0)
    a.refresh()
    assert float(backend.to_host(weight.data).min()) < 0  # nobody said that it changed
    a.dirty = True
    a.refresh()
    assert (backend.to_host(weight.data) == 1).all()
    np.testing.assert_array_equal(backend.to_host(weight.master), 1)


def test_history_is_laid_out_alike(backend) -> None:
    a = arena(backend)
    state = a.state()
    assert [part.shape for part in state.parts] == [p.shape for p in a.params]
    assert not backend.to_host(state.flat).any()
    backend.fill(state.parts[-1], 4.0)
    assert backend.to_host(state.flat)[256:263].tolist() == [4.0] * 7


# --- starting values -----------------------------------------------------------------------------------------------------


def drawn(text: str = NET, seed: int = 5) -> list[np.ndarray]:
    return [initial_values(info, seed) for info in build_graph(net_from_text(text, "net.prototxt"), phase=pb.TRAIN).owners]


def test_values_are_a_function_of_seed_layer_and_blob() -> None:
    values = drawn()
    for got, again in zip(values, drawn()):
        np.testing.assert_array_equal(got, again)
    assert not np.array_equal(values[0], drawn(seed=6)[0])
    assert not np.array_equal(values[0], drawn(NET.replace('name: "conv"', 'name: "other"'))[0])
    np.testing.assert_array_equal(values[0], drawn(NET.replace("BatchNorm", "ReLU").replace('layer { name: "scale"', 'layer { name: "zoom"'))[0])
    assert 1.5 < values[0].std() < 2.5
    assert 0 <= values[1].min() < values[1].max() <= 1
    assert not any(v.any() for v in values[2:5])
    assert (values[5] == 1).all()


def test_blobs_in_the_definition_come_before_fillers() -> None:
    spec = net_from_text(NET)
    array_to_blob(np.arange(189).reshape(7, 3, 3, 3), spec.param.layer[1].blobs.add())
    infos = build_graph(spec, phase=pb.TRAIN).owners
    np.testing.assert_array_equal(initial_values(infos[0], 1), np.arange(189).reshape(7, 3, 3, 3))
    assert initial_values(infos[1], 1).max() > 0


def test_blobs_of_another_size_are_refused() -> None:
    with pytest.raises(SpecError, match=r"^net.prototxt:3:.*: layer 'conv': blobs\[0\] holds 2 values for shape \(7, 3, 3, 3\)"):
        drawn(NET.replace("param { lr_mult: 2", "blobs { shape { dim: 2 } data: 1 data: 2 } param { lr_mult: 2"))
