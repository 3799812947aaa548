"""Running nets: losses and their weights, shared parameters, nets that share values, hooks, errors."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest
from data_samples import numbered
from solver_harness import GOLDEN

from caffelite.backends.contract import Backend
from caffelite.data.lmdb_source import Database
from caffelite.errors import DataError, SpecError
from caffelite.net import Net
from caffelite.schema import net_from_text, pb

INPUT = 'layer { name: "in" type: "Input" top: "x" top: "t" input_param { shape { dim: 4 dim: 3 } } }\n'
BN = 'layer { name: "bn" type: "BatchNorm" bottom: "x" top: "bn" }\n'


def make(backend: Backend, text: str, phase: int = pb.TRAIN, **options) -> Net:
    return Net(net_from_text(text, "net.prototxt"), phase=phase, backend=backend, **options)


def inner(name: str, bottom: str, extra: str = "", outputs: int = 3) -> str:
    return (
        f'layer {{ name: "{name}" type: "InnerProduct" bottom: "{bottom}" top: "{name}" {extra} '
        f"inner_product_param {{ num_output: {outputs} bias_term: false weight_filler {{ type: 'gaussian' }} }} }}\n"
    )


def distance(a: str, b: str, extra: str = "", top: str = "loss") -> str:
    tops = f'top: "{top}"' if top else ""
    return f'layer {{ name: "{top or extra}d" type: "EuclideanLoss" bottom: "{a}" bottom: "{b}" {tops} {extra if top else ""} }}\n'


def values(net: Net, **given: np.ndarray) -> None:
    for name, value in given.items():
        net.backend.from_host(value, net.blobs[name].data)


def host(net: Net, array: object) -> np.ndarray:
    return np.array(net.backend.to_host(array), np.float64)


def step(net: Net) -> float:
    """Gradients of one pass; returns its loss."""
    net.zero_grads()
    net.forward()
    loss = net.loss()
    net.backward()
    return loss


def close(got: np.ndarray, want: np.ndarray | float) -> None:
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


@pytest.fixture
def x(rng) -> np.ndarray:
    return rng.normal(size=(4, 3))


@pytest.fixture
def t(rng) -> np.ndarray:
    return rng.normal(size=(4, 3))


# --- losses ----------------------------------------------------------------------------------------------------------


def test_a_loss_weight_on_a_blob_that_is_also_read_adds_to_its_gradient(backend, x, t) -> None:
    text = "force_backward: true\n" + INPUT + 'layer { name: "p" type: "Power" bottom: "x" top: "p" power_param { scale: 2 } loss_weight: 0.25 }\n'
    net = make(backend, text + distance("p", "t", "loss_weight: 3"))
    for _ in range(3):  # the weights stay
        values(net, x=x, t=t)
        loss = step(net)
        assert loss == pytest.approx(0.25 * 2 * x.sum() + 3 * ((2 * x - t) ** 2).sum() / 8, rel=1e-5)
        close(host(net, net.blobs["x"].diff), 0.25 * 2 + 3 * 2 * (2 * x - t) / 4)


def test_a_loss_that_is_read_counts_once_with_its_weight(backend, x, t) -> None:
    text = INPUT + inner("y", "x") + distance("y", "t", "loss_weight: 0.5")
    text += 'layer { name: "twice" type: "Power" bottom: "loss" top: "twice" power_param { scale: 2 } loss_weight: 1 }\n'
    net = make(backend, text)
    values(net, x=x, t=t)
    loss, w = step(net), host(net, net.params["y"][0].master)
    one = ((x @ w.T - t) ** 2).sum() / 8
    assert loss == pytest.approx((0.5 + 2) * one, rel=1e-5)
    close(host(net, net.params["y"][0].diff), 2.5 * ((x @ w.T - t) / 4).T @ x)


def test_losses_without_tops_all_count(backend, x, t) -> None:
    text = (
        "force_backward: true\n" + INPUT + distance("x", "t", "one", "") + 'layer { name: "h" type: "Power" bottom: "x" top: "h" power_param { scale: 0.5 } }\n'
    )
    net = make(backend, text + distance("h", "t", "two", "").replace("}\n", "loss_weight: 2 }\n"))
    values(net, x=x, t=t)
    assert step(net) == pytest.approx((((x - t) ** 2).sum() + 2 * ((x / 2 - t) ** 2).sum()) / 8, rel=1e-5)
    close(host(net, net.blobs["x"].diff), ((x - t) + (x / 2 - t)) / 4)
    assert net.outputs == []


@pytest.mark.parametrize("reader", ['type: "Silence"', 'type: "Power" top: "shown"'])
def test_a_loss_that_others_read_is_kept_until_the_pass_has_ended(backend, x, t, reader: str) -> None:
    text = INPUT + inner("y", "x") + distance("y", "t") + f'layer {{ name: "r" bottom: "loss" {reader} }}\n'
    for i in range(4):  # layers that could take the loss's memory
        text += inner(f"z{i}", "x" if i == 0 else f"z{i - 1}")
    net = make(backend, text + distance("z3", "t", top="other"))
    values(net, x=x, t=t)
    step(net)
    expected = [host(net, top.data) for top, _ in net.weighted_tops()]
    w = host(net, net.params["y"][0].master)
    close(expected[0], ((x @ w.T - t) ** 2).sum() / 8)


def test_a_branch_without_gradient_counts_as_zero(backend, x, t) -> None:
    text = INPUT + inner("a", "x") + inner("b", "a", "propagate_down: false") + distance("b", "t") + distance("a", "t", "loss_weight: 2", "near")
    net = make(backend, text)
    values(net, x=x, t=t)
    step(net)
    w = host(net, net.params["a"][0].master)
    close(host(net, net.params["a"][0].diff), 2 * ((x @ w.T - t) / 4).T @ x)


# --- shared parameters -------------------------------------------------------------------------------------------------


def test_uses_of_one_parameter_add_up_and_a_new_sum_starts_afresh(backend, x, t) -> None:
    text = INPUT + inner("a", "x", 'param { name: "w" }') + inner("b", "a", 'param { name: "w" }') + distance("b", "t")
    net = make(backend, text)
    values(net, x=x, t=t)
    assert len(net.learnable) == 1
    w = host(net, net.learnable[0].master)
    dy = ((x @ w.T) @ w.T - t) / 4
    want = dy.T @ (x @ w.T) + (dy @ w).T @ x
    for _ in range(2):
        step(net)
        close(host(net, net.learnable[0].diff), want)
    net.forward()
    net.backward()
    close(host(net, net.learnable[0].diff), 2 * want)


def test_one_parameter_twice_in_a_layer(backend, x, t) -> None:
    scale = 'layer { name: "s" type: "Scale" bottom: "x" top: "s" param { name: "w" } param { name: "w" } scale_param { bias_term: true } }\n'
    net = make(backend, INPUT + scale + distance("s", "t"))
    values(net, x=x, t=t)
    for _ in range(2):
        step(net)
        dy = (x * 1 + 1 - t) / 4
        close(host(net, net.learnable[0].diff), (dy * x + dy).sum(0))


def test_a_permissive_use_in_another_shape(backend, x, t) -> None:
    text = INPUT + inner("a", "x", 'param { name: "w" }', outputs=1)
    text += 'layer { name: "s" type: "Scale" bottom: "x" top: "s" param { name: "w" share_mode: PERMISSIVE } }\n'
    net = make(backend, text + distance("s", "t") + 'layer { name: "q" type: "Silence" bottom: "a" }')
    values(net, x=x, t=t)
    assert [p.shape for p in (*net.params["a"], *net.params["s"])] == [(1, 3), (3,)]
    for _ in range(2):
        step(net)
        w = host(net, net.learnable[0].master)[0]
        close(host(net, net.learnable[0].diff), ((x * w - t) / 4 * x).sum(0, keepdims=True))


SPATIAL = """layer { name: "in" type: "Input" top: "x" top: "t" input_param { shape { dim: 2 dim: 3 dim: 5 dim: 7 } shape { dim: 2 dim: 4 dim: 5 dim: 7 } } }
layer { name: "a" type: "Convolution" bottom: "x" top: "a" param { %s } convolution_param { num_output: 4 kernel_size: 3 pad: 1 bias_term: false } }
layer { name: "b" type: "Convolution" bottom: "x" top: "b" param { %s share_mode: PERMISSIVE }
        convolution_param { num_output: 4 kernel_h: 1 kernel_w: 9 pad_w: 4 bias_term: false } }
layer { name: "y" type: "Eltwise" bottom: "a" bottom: "b" top: "y" }
"""


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_permissive_use_of_spatial_weights_keeps_the_order_of_caffe(backend, rng, precision: str) -> None:
    x, t, w = rng.normal(size=(2, 3, 5, 7)), rng.normal(size=(2, 4, 5, 7)), rng.normal(size=(4, 3, 3, 3)).astype(np.float32)
    shared, apart = (make(backend, SPATIAL % names + distance("y", "t"), precision=precision) for names in (("name: 'w'", "name: 'w'"), ("", "")))
    backend.from_host(w, shared.learnable[0].master)
    backend.from_host(w, apart.learnable[0].master)
    backend.from_host(w.reshape(4, 3, 1, 9), apart.learnable[1].master)
    for net in (shared, apart):
        net.parameters_changed()
        values(net, x=x, t=t)
        step(net)
    assert shared.params["b"][0].shape == (4, 3, 1, 9)
    assert shared.loss() == pytest.approx(apart.loss(), rel=1e-6)
    first, second = (host(apart, param.diff) for param in apart.learnable)
    np.testing.assert_allclose(host(shared, shared.learnable[0].diff), first + second.reshape(w.shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", ["(2, 6, 3, 3)", "(4, 27)"])
def test_a_permissive_use_that_would_reorder_is_refused(backend, shape: str) -> None:
    first = "".join(SPATIAL.splitlines(keepends=True)[:2]) % "name: 'w'"
    second = {
        "(2, 6, 3, 3)": 'layer { name: "xx" type: "Concat" bottom: "x" bottom: "x" top: "xx" }\n'
        'layer { name: "b" type: "Convolution" bottom: "xx" top: "b" param { name: "w" share_mode: PERMISSIVE } '
        "convolution_param { num_output: 2 kernel_size: 3 bias_term: false } }\n",
        "(4, 27)": 'layer { name: "m" type: "Input" top: "m" input_param { shape { dim: 2 dim: 27 } } }\n'
        + inner("b", "m", 'param { name: "w" share_mode: PERMISSIVE }', outputs=4),
    }[shape]
    with pytest.raises(SpecError) as caught:
        make(backend, first + second)
    assert "net.prototxt:" in str(caught.value)
    assert f"parameter 'w' has the shape (4, 3, 3, 3) in layer 'a' and {shape} here" in str(caught.value)
    assert "one shape, or each a parameter of its own" in str(caught.value)


def test_a_frozen_parameter_gets_no_gradient(backend, x, t) -> None:
    text = INPUT + inner("a", "x", 'param { name: "w" lr_mult: 0 }') + inner("b", "a") + inner("c", "b", 'param { name: "w" }') + distance("c", "t")
    net = make(backend, text)
    values(net, x=x, t=t)
    backend.fill(net.learnable[0].diff, 7.0)
    step(net)
    net.arena.settle_grads()
    assert not host(net, net.learnable[0].diff).any()
    assert host(net, net.learnable[1].diff).any()


def test_looking_for_a_fault_leaves_statistics_alone(backend, x, t) -> None:
    net = make(backend, INPUT + BN + inner("y", "bn") + distance("y", "t"))
    values(net, x=x, t=t)
    net.forward()
    before = [host(net, param.master) for param in net.params["bn"]]
    close(before[0], x.mean(0))
    assert before[2] == [1]
    net.recheck()
    assert net.first_nonfinite() is None
    values(net, x=np.where(np.arange(3) == 1, np.inf, x))
    assert net.first_nonfinite() == "layer 'in' (Input): its top 'x' is not finite"
    for param, want in zip(net.params["bn"], before):
        np.testing.assert_array_equal(host(net, param.master), want)


@pytest.mark.parametrize("read", [False, True])
def test_statistics_are_to_blame_only_where_they_are_read(backend, x, t, read: bool) -> None:
    """Passes after the bad one may have spoilt those that are only written."""
    extra = " batch_norm_param { use_global_stats: true } }" if read else " }"
    net = make(backend, INPUT + BN.replace(" }", extra) + inner("y", "bn") + distance("y", "t"))
    values(net, x=x, t=t)
    backend.fill(net.params["bn"][1].master, float("nan"))
    assert net.first_nonfinite() == ("layer 'bn' (BatchNorm): its parameter 1 is not finite" if read else None)


# --- nets that share -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observe", [False, True])
def test_a_test_net_follows_values_and_statistics(backend, x, t, observe: bool) -> None:
    text = INPUT + BN + inner("y", "bn") + distance("y", "t")
    train = make(backend, text, observe=observe)
    test = make(backend, text, pb.TEST, share=train, workspace=train, observe=observe, seed=9)
    values(train, x=x, t=t)
    step(train)
    backend.fill(train.params["y"][0].master, 0.5)
    train.parameters_changed()
    values(test, x=x, t=t)
    test.forward()
    mean, variance = x.mean(0), x.var(0, ddof=1)
    assert test.loss() == pytest.approx(((0.5 * ((x - mean) / np.sqrt(variance + 1e-5)).sum(1, keepdims=True) - t) ** 2).sum() / 8, rel=1e-4)
    assert not any(np.shares_memory(train.persistent_buffer, blob.data) for blob in test.blobs.values())


def test_a_test_net_that_runs_backward_leaves_the_train_nets_gradients(backend, x, t) -> None:
    text = INPUT + inner("y", "x") + distance("y", "t")
    train = make(backend, text, observe=True)
    test = make(backend, text, pb.TEST, share=train, observe=True)
    for net in (train, test):
        values(net, x=x, t=t)
        step(net)
    before = host(train, train.learnable[0].diff)
    values(test, x=2 * x)
    step(test)
    np.testing.assert_array_equal(host(train, train.learnable[0].diff), before)
    assert not np.array_equal(host(test, test.params["y"][0].diff), before)


@pytest.mark.parametrize("observe", [False, True])
def test_weights_loaded_through_a_sharing_net_reach_the_bfloat16_copies(backend, x, t, observe: bool) -> None:
    text = INPUT + inner("y", "x") + distance("y", "t")
    train = make(backend, text, precision="bfloat16", observe=observe)
    test = make(backend, text, pb.TEST, precision="bfloat16", share=train, observe=observe)
    tail = make(backend, text, pb.TEST, precision="bfloat16", share=test, observe=observe)
    for net in (train, test, tail):
        values(net, x=x, t=t)
        net.forward()
    message = test.to_proto()
    message.layer[1].blobs[0].data[:] = [1.0] * 9
    test.copy_from(message)
    for net in (tail, train, test):
        net.forward()
        np.testing.assert_allclose(host(net, net.blobs["y"].data), np.repeat(x.sum(1, keepdims=True), 3, 1), rtol=0.02, atol=0.02)


def test_share_with_joins_layers_of_one_name(backend, x, t) -> None:
    ours = make(backend, INPUT + inner("a", "x") + inner("b", "x") + distance("a", "b"), seed=1)
    theirs = make(backend, INPUT + inner("b", "x") + inner("c", "x") + distance("b", "c"), seed=2)
    a = host(ours, ours.params["a"][0].master)
    ours.share_with(theirs)
    backend.fill(theirs.params["b"][0].master, 3.0)
    values(ours, x=x)
    ours.forward()
    close(host(ours, ours.blobs["b"].data), 3 * x.sum(1, keepdims=True).repeat(3, 1))
    close(host(ours, ours.blobs["a"].data), x @ a.T)


def test_sharing_is_refused_where_shapes_differ(backend) -> None:
    train = make(backend, INPUT + inner("a", "x") + inner("y", "a", outputs=2))
    with pytest.raises(SpecError, match=r"net.prototxt:3:1: layer 'y': shares its parameters .* \[\(3, 3\)\] here, \[\(2, 3\)\] there"):
        make(backend, INPUT + inner("a", "x") + inner("y", "a"), pb.TEST, share=train)
    other = make(backend, INPUT + inner("a", "x") + inner("y", "a"))
    before = other.params["a"][0].master
    with pytest.raises(SpecError, match="layer 'y'"):
        other.share_with(train)
    assert other.params["a"][0].master is before


def test_class_numbers_stay_exact_in_bfloat16(backend) -> None:
    text = """layer { name: "in" type: "Input" top: "x" top: "t" input_param { shape { dim: 3 dim: 600 } shape { dim: 3 } } }
    layer { name: "from_1" type: "Power" bottom: "t" top: "t0" power_param { shift: -1 } }
    layer { name: "same" type: "Eltwise" bottom: "t0" bottom: "t0" top: "t1" eltwise_param { operation: MAX } }
    layer { name: "loss" type: "SoftmaxWithLoss" bottom: "x" bottom: "t1" top: "loss" }"""
    net, scores = make(backend, text, precision="bfloat16"), np.zeros((3, 600))
    classes = np.array([257, 515, 599])
    scores[np.arange(3), classes] = 40
    values(net, x=scores, t=classes + 1)
    net.forward()
    assert net.loss() == pytest.approx(0, abs=1e-6)


# --- running -------------------------------------------------------------------------------------------------------------


def test_hooks_are_called_around_every_layer(backend, x, t) -> None:
    net, heard = make(backend, INPUT + inner("y", "x") + distance("y", "t"), observe=True), []
    for name, hooks in vars(net.hooks).items():
        hooks.append(lambda index, name=name: heard.append((name, index)))
    net.forward(1)
    net.backward(1)
    assert heard == [
        *[("before_forward", 1), ("after_forward", 1), ("before_forward", 2), ("after_forward", 2)],
        *[("before_backward", 1), ("after_backward", 1), ("before_backward", 0), ("after_backward", 0)],
    ]


def test_an_error_while_running_names_its_layer(backend, x) -> None:
    labels = INPUT.replace("shape { dim: 4 dim: 3 }", "shape { dim: 4 dim: 3 } shape { dim: 4 }")
    net = make(backend, labels + 'layer { name: "soft" type: "SoftmaxWithLoss" bottom: "x" bottom: "t" top: "loss" }')
    values(net, x=x, t=np.array([0, 1, 3, 2]))
    with pytest.raises(DataError, match=r"^layer 'soft': label 3 at position 2 of the batch is outside 0\.\.2"):
        net.forward()


@pytest.mark.parametrize("shared", [False, True])
def test_a_label_out_of_range_names_its_record(backend, tmp_path, shared) -> None:
    path, _ = numbered(tmp_path / "db", 6)
    text = f"""
    layer {{ name: "data" type: "Data" top: "data" top: "t" data_param {{ source: "{path}" backend: LMDB batch_size: 4 }} }}
    layer {{ name: "ip" type: "InnerProduct" bottom: "data" top: "x" inner_product_param {{ num_output: 5 }} }}
    layer {{ name: "soft" type: "SoftmaxWithLoss" bottom: "x" bottom: "t" top: "loss" }}
    """
    net = make(backend, text + ('layer { name: "quiet" type: "Silence" bottom: "t" }' if shared else ""))
    net.forward()  # labels 0 to 3; the next are 4, 5, 0 and 1
    with Database(path) as database, closing(database.reader()) as reader:
        key = next(reader.read([5], ordered=True))[0].decode()
    with pytest.raises(DataError, match=rf"^layer 'soft': label 5 at position 1 of the batch is outside 0\.\.4 \(record '{key}' of {path}\)"):
        net.forward()
    net.close()


def test_the_search_for_what_is_not_finite_reads_the_same_batch_again(backend) -> None:
    text = f"""
    layer {{ name: "data" type: "Data" top: "data" top: "label" data_param {{ source: "{GOLDEN}/lmdb" backend: LMDB batch_size: 8 shuffle: true }} }}
    layer {{ name: "conv" type: "Convolution" bottom: "data" top: "conv" convolution_param {{ num_output: 2 kernel_size: 3 }} }}
    layer {{ name: "relu" type: "ReLU" bottom: "conv" top: "conv" }}
    layer {{ name: "log" type: "Power" bottom: "conv" top: "log" power_param {{ power: -1 }} }}
    layer {{ name: "sum" type: "InnerProduct" bottom: "log" top: "sum" inner_product_param {{ num_output: 10 }} }}
    layer {{ name: "loss" type: "SoftmaxWithLoss" bottom: "sum" bottom: "label" top: "loss" }}"""
    net = make(backend, text, seed=3)
    try:
        with np.errstate(all="ignore"):
            net.forward()
            net.forward()
            labels = host(net, net.blobs["label"].data)
            net.rewind()
            assert net.first_nonfinite() == "layer 'log' (Power): its top 'log' is not finite"
        np.testing.assert_array_equal(host(net, net.blobs["label"].data), labels)
        assert net.data_layers[0].source.position == 16
        backend.fill(net.params["conv"][1].master, float("nan"))
        net.rewind()
        assert net.first_nonfinite() == "layer 'conv' (Convolution): its parameter 1 is not finite"
    finally:
        net.close()
