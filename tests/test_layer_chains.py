"""Layers in place one after the other in a net compute what they compute with tops of their own."""

from __future__ import annotations

import numpy as np
import pytest

from caffelite.backends.contract import Backend
from caffelite.errors import SpecError
from caffelite.net import Net
from caffelite.schema import net_from_text, pb

HEAD = """force_backward: true
layer { name: "in" type: "Input" top: "x" top: "t" input_param { shape { dim: 4 dim: 3 dim: 6 dim: 5 } shape { dim: 4 } } }
layer { name: "conv" type: "Convolution" bottom: "x" top: "a" convolution_param { num_output: 5 kernel_size: 3 weight_filler { type: "msra" } } }
"""
TAIL = """layer { name: "ip" type: "InnerProduct" bottom: "%s" top: "ip" inner_product_param { num_output: 4 weight_filler { type: "msra" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "t" top: "loss" }
"""
KINDS = {
    "BatchNorm": "",
    "Scale": "scale_param { bias_term: true filler { type: 'uniform' min: 0.5 max: 2 } bias_filler { type: 'gaussian' } }",
    "Bias": "bias_param { filler { type: 'gaussian' } }",
    "ReLU": "",
    "PReLU": "",
    "ELU": "",
    "Sigmoid": "",
    "TanH": "",
    "Softmax": "",
    "Dropout": "",
}
CHAINS = [
    "BatchNorm Scale ReLU",
    "Scale Bias ReLU Dropout",
    "PReLU Scale BatchNorm PReLU",
    "Bias ELU",
    "BatchNorm Sigmoid",
    "ReLU Dropout ReLU",
    "Scale Softmax",
    "Bias TanH",
]


def build(backend: Backend, chain: list[str], in_place: set[int]) -> Net:
    text, bottom = HEAD, "a"
    for i, kind in enumerate(chain):
        top = bottom if i in in_place else f"b{i}"
        text += f'layer {{ name: "l{i}" type: "{kind}" bottom: "{bottom}" top: "{top}" {KINDS[kind]} }}\n'
        bottom = top
    return Net(net_from_text(text + TAIL % bottom), phase=pb.TRAIN, backend=backend, seed=7)


def run(net: Net) -> dict[str, np.ndarray]:
    rng, ops = np.random.default_rng(2), net.backend
    ops.from_host(rng.standard_normal((4, 3, 6, 5)), net.blobs["x"].data)
    ops.from_host(np.array([0, 3, 1, 2]), net.blobs["t"].data)
    net.forward()
    net.zero_grads()
    net.backward()
    got = {"loss": np.array(net.loss()), "dx": np.array(ops.to_host(net.blobs["x"].diff))}
    for name, params in net.params.items():
        for i, param in enumerate(params):
            got[f"{name}/{i}"] = np.array(ops.to_host(param.diff if param.learn else param.master))
    return got


@pytest.mark.parametrize("chain", CHAINS)
def test_in_place_changes_nothing(backend: Backend, chain: str) -> None:
    kinds = chain.split()
    apart = run(build(backend, kinds, set()))
    assert any(np.abs(value).max() > 0 for name, value in apart.items() if name.startswith("conv"))
    for in_place in ({*range(len(kinds))}, {*range(1, len(kinds))}):
        got = run(build(backend, kinds, in_place))
        for name, want in apart.items():
            np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-6, err_msg=f"{name}, in place: {in_place}")


@pytest.mark.parametrize("chain", ["ELU Bias", "Sigmoid Scale", "ReLU Bias"])
def test_a_top_that_backward_needs_is_not_overwritten(backend: Backend, chain: str) -> None:
    with pytest.raises(SpecError, match="needs for its gradient"):
        build(backend, chain.split(), {1})
