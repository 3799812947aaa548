"""Convolution: shapes, every refusal, and values and gradients against loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from layer_harness import Rig, check_gradient, close, make_layer, refusal, shapes_of

from caffelite.backends.contract import Backend


def text(fields: str) -> str:
    return f'type: "Convolution"\nconvolution_param {{ {fields} }}'


@pytest.mark.parametrize(
    ("fields", "bottom", "top"),
    [
        ("num_output: 6 kernel_size: 3", (2, 3, 7, 9), (2, 6, 5, 7)),
        ("num_output: 6 kernel_size: 3 stride: 2 pad: 1", (2, 3, 7, 9), (2, 6, 4, 5)),
        ("num_output: 6 kernel_h: 1 kernel_w: 3 stride_h: 2 stride_w: 1 pad_h: 0 pad_w: 1", (2, 3, 7, 9), (2, 6, 4, 9)),
        ("num_output: 6 kernel_size: 3 pad_h: 2", (2, 3, 7, 9), (2, 6, 9, 7)),  # a pad left out is 0
        ("num_output: 6 kernel_size: [1, 3] stride: [3, 1] pad: [0, 1] dilation: [1, 2]", (2, 3, 7, 9), (2, 6, 3, 7)),
        ("num_output: 6 kernel_size: 3 dilation: 2", (2, 3, 7, 9), (2, 6, 3, 5)),
        ("num_output: 96 kernel_size: 11 stride: 4", (1, 3, 227, 227), (1, 96, 55, 55)),
        ("num_output: 6 kernel_size: 3", (2, 3, 7), (2, 6, 5)),
        ("num_output: 6 kernel_size: 3", (2, 3, 7, 9, 11), (2, 6, 5, 7, 9)),
        ("num_output: 6 kernel_size: 1", (2, 3), (2, 6)),
        ("num_output: 6", (2, 3), (2, 6)),
        ("num_output: 6 kernel_size: 3 axis: 0", (3, 7, 9), (6, 5, 7)),
        ("num_output: 6 kernel_size: 3 axis: -2", (2, 4, 3, 7), (2, 4, 6, 5)),
        ("num_output: 1 kernel_h: 7 kernel_w: 9", (2, 3, 7, 9), (2, 1, 1, 1)),  # one window over the whole plane
        ("num_output: 6 kernel_size: 7 pad: 2", (2, 3, 3, 4), (2, 6, 1, 2)),  # larger than the plane, but not with its padding
        ("num_output: 6 kernel_size: 3 engine: CUDNN force_nd_im2col: true", (2, 3, 7, 9), (2, 6, 5, 7)),
    ],
)
def test_top_shape(fields: str, bottom: tuple[int, ...], top: tuple[int, ...]) -> None:
    assert shapes_of(text(fields), bottom) == [top]


def test_parameters_and_work() -> None:
    layer = make_layer(text("num_output: 6 kernel_size: 3 group: 3 weight_filler { type: 'msra' } bias_filler { value: 1 }"))
    weight, bias = layer.param_specs([(2, 9, 5, 5)])
    assert (weight.shape, weight.filler.type, bias.shape, bias.filler.value) == ((6, 3, 3, 3), "msra", (6,), 1)
    assert layer.multiply_adds([(2, 9, 5, 5)]) == 2 * 6 * 9 * 3 * 9
    assert make_layer(text("num_output: 6"), bottoms=2, tops=2).multiply_adds([(2, 3)] * 2) == 2 * 2 * 6 * 3
    assert [s.shape for s in make_layer(text("num_output: 6 bias_term: false")).param_specs([(2, 3)])] == [(6, 3)]
    assert layer.buffer_specs([(2, 9, 5, 5)], ["float32"], None) == {}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "shapes", "message"),
    [
        ("@kernel_size: 3", [(2, 3, 5, 5)], "num_output is missing or 0"),
        ("@num_output: 0 kernel_size: 3", [(2, 3, 5, 5)], "num_output is missing or 0"),
        ("num_output: 4 kernel_size: 3 @group: 3", [(2, 3, 5, 5)], "group 3 does not divide num_output 4"),
        ("num_output: 4 kernel_size: 3 @group: 0", [(2, 3, 5, 5)], "group 0 does not divide"),
        ("num_output: 4 kernel_size: 3 @group: 2", [(2, 3, 5, 5)], "group 2 does not divide the bottom's 3 channels"),
        ("num_output: 4 @kernel_size: 0", [(2, 3, 5, 5)], "kernel_size is 0"),
        ("num_output: 4 kernel_size: 3 kernel_size: 3 @kernel_size: 0", [(2, 3, 5, 5)], "kernel_size is 0"),
        ("num_output: 4 @kernel_size: 1 kernel_size: 2 kernel_size: 3", [(2, 3, 5, 5)], "3 values of kernel_size for 2 spatial axes"),
        ("num_output: 4 kernel_size: 3 @kernel_h: 3 kernel_w: 3", [(2, 3, 5, 5)], "both kernel_size and kernel_h are given"),
        ("num_output: 4 @kernel_h: 3", [(2, 3, 5, 5)], "kernel_h is given, but kernel_w is missing or 0"),
        ("num_output: 4 kernel_h: 0 kernel_w: 3", [(2, 3, 5, 5)], "kernel_h is missing or 0"),
        ("num_output: 4 @kernel_h: 3 kernel_w: 3", [(2, 3, 5)], "kernel_h is given for 1 spatial axes"),
        ("num_output: 4", [(2, 3, 5, 5)], "the kernel's size is missing"),
        ("num_output: 4 kernel_size: 3 @stride: 0", [(2, 3, 5, 5)], "stride is 0"),
        ("num_output: 4 kernel_size: 3 @stride_h: 2", [(2, 3, 5, 5)], "stride_h is given, but stride_w is missing or 0"),
        ("num_output: 4 kernel_size: 3 stride: 1 @stride_w: 2", [(2, 3, 5, 5)], "both stride and stride_w"),
        ("num_output: 4 kernel_size: 3 pad: 1 @pad_w: 2", [(2, 3, 5, 5)], "both pad and pad_w"),
        ("num_output: 4 kernel_size: 3 @pad: 1 pad: 1 pad: 1", [(2, 3, 5, 5)], "3 values of pad"),
        ("num_output: 4 kernel_size: 3 @dilation: 0", [(2, 3, 5, 5)], "dilation is 0"),
        ("num_output: 4 kernel_size: 3 @axis: 4", [(2, 3, 5, 5)], "axis 4 does not exist in a bottom with 4 axes"),
        ("num_output: 4 kernel_size: 3 @axis: -5", [(2, 3, 5, 5)], "axis -5 does not exist"),
        ("num_output: 4 kernel_size: 3 dilation: 2", [(2, 3, 6, 4)], "spatial axis 1: the kernel reaches over 5 cells, but the bottom has 4 with 0 of padding"),
        ("num_output: 4 kernel_size: 6 pad: 1", [(2, 3, 3, 4)], "spatial axis 0: the kernel reaches over 6 cells, but the bottom has 3 with 1 of padding"),
        ("num_output: 4 kernel_size: 3", [(2, 3, 5, 5), (2, 3, 5, 6)], "bottom 1 has shape (2, 3, 5, 6), bottom 0 (2, 3, 5, 5)"),
    ],
)
def test_refusals(fields: str, shapes: list[tuple[int, ...]], message: str) -> None:
    marked = fields if len(shapes) == 1 and message.split()[0] != "num_output" else fields.replace("@", "")
    assert message in refusal(text(marked), shapes, tops=len(shapes))


def convolve(x: np.ndarray, w: np.ndarray, b: np.ndarray, stride: int, pad: int, dilation: int, group: int) -> np.ndarray:
    """One output at a time, over any number of spatial axes."""
    axes = x.ndim - 2
    padded = np.pad(x, [(0, 0), (0, 0)] + [(pad, pad)] * axes)
    reach = [dilation * (k - 1) + 1 for k in w.shape[2:]]
    out = [(n - r) // stride + 1 for n, r in zip(padded.shape[2:], reach)]
    y = np.zeros((x.shape[0], w.shape[0], *out))
    ins, outs = x.shape[1] // group, w.shape[0] // group
    for o, place in itertools.product(range(w.shape[0]), np.ndindex(*out)):
        window = tuple(slice(p * stride, p * stride + r, dilation) for p, r in zip(place, reach))
        channels = slice(o // outs * ins, o // outs * ins + ins)
        cells = padded[(slice(None), channels, *window)]
        y[(slice(None), o, *place)] = (cells * w[o]).sum(axis=tuple(range(1, cells.ndim))) + b[o]
    return y


@pytest.mark.parametrize(
    ("fields", "shape", "kernel", "settings"),
    [
        ("kernel_size: 3 stride: 2 pad: 1 group: 2", (2, 4, 7, 5), (3, 3), (2, 1, 1, 2)),
        ("kernel_size: 2 dilation: 2", (2, 3, 5, 6), (2, 2), (1, 0, 2, 1)),
        ("kernel_size: 3 pad: 1", (2, 3, 7), (3,), (1, 1, 1, 1)),
        ("kernel_size: 2", (2, 3, 3, 4, 3), (2, 2, 2), (1, 0, 1, 1)),
    ],
)
def test_values_with_any_number_of_spatial_axes(
    backend: Backend, rng: np.random.Generator, fields: str, shape: tuple[int, ...], kernel: tuple[int, ...], settings: tuple[int, ...]
) -> None:
    group = settings[-1]
    x, w, b = rng.standard_normal(shape), rng.standard_normal((4, shape[1] // group, *kernel)), rng.standard_normal(4)
    close(Rig(backend, text(f"num_output: 4 {fields}"), [x], [w, b]).forward()[0], convolve(x, w, b, *settings))


@pytest.mark.parametrize(("axis", "shape"), [(0, (3, 5, 6)), (2, (2, 2, 3, 7)), (2, (2, 2, 3, 5, 4)), (0, (3, 5, 4, 4)), (3, (2, 2, 2, 3))])
def test_axes_before_the_channels_are_batch(backend: Backend, rng: np.random.Generator, axis: int, shape: tuple[int, ...]) -> None:
    axes = len(shape) - axis - 1
    flat = (int(np.prod(shape[:axis])), *shape[axis:])
    x, w, b = rng.standard_normal(shape), rng.standard_normal((4, 3, *[2] * axes)), rng.standard_normal(4)
    rig = Rig(backend, text(f"num_output: 4 kernel_size: 2 axis: {axis}"), [x], [w, b])
    want = convolve(x.reshape(flat), w, b, 1, 0, 1, 1)
    close(rig.forward()[0], want.reshape((*shape[:axis], *want.shape[1:])))
    dy = rng.standard_normal(want.shape)
    plain = Rig(backend, text("num_output: 4 kernel_size: 2"), [x.reshape(flat)], [w, b])
    plain.forward()
    close(rig.backward(dy.reshape(rig.tops[0].shape))[0], plain.backward(dy)[0].reshape(shape))
    for got, expected in zip(rig.gradients(), plain.gradients()):
        close(got, expected)


@pytest.mark.parametrize(
    ("fields", "shapes", "weight"),
    [
        ("kernel_size: 3 stride: 2 pad: 1 group: 2", [(2, 4, 5, 4)], (2, 2, 3, 3)),
        ("kernel_size: 2 dilation: 2", [(2, 2, 4, 4)], (2, 2, 2, 2)),
        ("kernel_size: 2 pad: 1", [(2, 2, 3), (2, 2, 3)], (2, 2, 2)),
        ("", [(3, 2)], (2, 2)),
        ("axis: 2 kernel_size: 2", [(2, 2, 3, 3)], (2, 3, 2)),
        ("axis: 3", [(2, 2, 2, 3)], (2, 3)),
    ],
)
def test_gradients(rng: np.random.Generator, fields: str, shapes: list[tuple[int, ...]], weight: tuple[int, ...]) -> None:
    values = [rng.standard_normal(shape) for shape in shapes]
    params = [rng.standard_normal(weight), rng.standard_normal(2)]
    check_gradient(text(f"num_output: 2 {fields}"), values, params, tops=len(shapes))


def test_bottoms_share_weights_and_gradients_accumulate_when_asked(backend: Backend, rng: np.random.Generator) -> None:
    xs, w = [rng.standard_normal((2, 3, 4, 4)) for _ in range(2)], rng.standard_normal((4, 3, 1, 1))
    rig = Rig(backend, text("num_output: 4 kernel_size: 1 bias_term: false"), xs, [w], tops=2)
    for y, x in zip(rig.forward(), xs):
        close(y, np.einsum("nchw,oc->nohw", x, w[:, :, 0, 0]))
    dys = [rng.standard_normal((2, 4, 4, 4)) for _ in range(2)]
    want = sum(np.einsum("nchw,nohw->oc", x, dy) for x, dy in zip(xs, dys))[:, :, None, None]
    rig.backward(*dys)
    close(rig.gradients()[0], want)
    rig.layer.params[0].accumulate = True
    dx = rig.backward(*dys, down=[False, True], poison=False)
    close(rig.gradients()[0], 2 * want)
    close(dx[1], np.einsum("nohw,oc->nchw", dys[1], w[:, :, 0, 0]))


def test_only_what_is_asked_for_is_computed(backend: Backend, rng: np.random.Generator) -> None:
    x, w, b = rng.standard_normal((2, 3, 4, 4)), rng.standard_normal((4, 3, 3, 3)), rng.standard_normal(4)
    rig = Rig(backend, text("num_output: 4 kernel_size: 3"), [x], [w, b])
    rig.forward()
    rig.layer.params[0].learn = False
    dy = rng.standard_normal((2, 4, 2, 2))
    dx = rig.backward(dy, down=[False])
    assert np.isnan(dx[0]).all()
    assert np.isnan(rig.gradients()[0]).all()
    close(rig.gradients()[1], dy.sum(axis=(0, 2, 3)))


def test_relu_may_be_computed_along(backend: Backend, rng: np.random.Generator) -> None:
    x, w, b = rng.standard_normal((2, 3, 5, 5)), rng.standard_normal((4, 3, 3, 3)), rng.standard_normal(4)
    rig = Rig(backend, text("num_output: 4 kernel_size: 3"), [x], [w, b])
    rig.layer.relu = True  # type: ignore[attr-defined]
    close(rig.forward()[0], np.maximum(convolve(x, w, b, 1, 0, 1, 1), 0))
