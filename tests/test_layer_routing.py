"""Concat, Slice, Split, Flatten, Reshape, Silence, Eltwise: shapes, values, gradients, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from layer_harness import Rig, all_different, check_gradient, close, make_layer, refusal, shapes_of

from caffelite.backends.contract import Backend

# --- Concat and Slice ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["axis: 1", "axis: -3", "concat_dim: 1", ""])
def test_concat(backend: Backend, rng: np.random.Generator, field: str) -> None:
    xs, dy = [rng.standard_normal((2, n, 4, 5)) for n in (3, 1, 2)], rng.standard_normal((2, 6, 4, 5))
    rig = Rig(backend, f'type: "Concat" concat_param {{ {field} }}', xs)
    close(rig.forward()[0], np.concatenate(xs, axis=1))
    got = rig.backward(dy, down=[True, False, True])
    close(got[0], dy[:, :3])
    assert np.isnan(got[1]).all()
    close(got[2], dy[:, 4:])


@pytest.mark.parametrize(("axis", "shape"), [(0, (2, 3, 4, 5)), (3, (2, 3, 4, 5)), (0, (4,)), (1, (2, 3, 4))])
def test_concat_and_slice_along_any_axis(backend: Backend, rng: np.random.Generator, axis: int, shape: tuple[int, ...]) -> None:
    xs = [rng.standard_normal(shape) for _ in range(2)]
    joined = np.concatenate(xs, axis=axis)
    close(Rig(backend, f'type: "Concat" concat_param {{ axis: {axis} }}', xs).forward()[0], joined)
    rig = Rig(backend, f'type: "Slice" slice_param {{ axis: {axis} }}', [joined], tops=2)
    for got, want in zip(rig.forward(), xs):
        close(got, want)
    close(rig.backward(xs[1], xs[0])[0], np.concatenate(xs[::-1], axis=axis))


def test_slice_at_points(backend: Backend, rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 7, 3, 4))
    rig = Rig(backend, 'type: "Slice" slice_param { slice_point: 2 slice_point: 3 }', [x], tops=3)
    for got, want in zip(rig.forward(), np.split(x, [2, 3], axis=1)):
        close(got, want)
    dys = [rng.standard_normal((2, n, 3, 4)) for n in (2, 1, 4)]
    close(rig.backward(*dys)[0], np.concatenate(dys, axis=1))
    assert shapes_of('type: "Slice" slice_param { slice_dim: 0 }', (4, 3), tops=2) == [(2, 3), (2, 3)]
    assert shapes_of('type: "Slice" slice_param { axis: -1 }', (4, 3)) == [(4, 3)]


@pytest.mark.parametrize(
    ("text", "shapes", "tops", "message"),
    [
        ('type: "Concat"\nconcat_param { axis: 1 @concat_dim: 1 }', [(2, 3)], 1, "both axis and concat_dim are given"),
        ('type: "Concat"\nconcat_param { @axis: 2 }', [(2, 3)], 1, "axis 2 does not exist in a bottom with 2 axes"),
        ('type: "Concat"\nconcat_param { @concat_dim: 2 }', [(2, 3)], 1, "axis 2 does not exist"),
        ('type: "Concat"', [(2, 3, 4), (2, 3, 5)], 1, "bottom 1 has shape (2, 3, 5), bottom 0 (2, 3, 4)"),
        ('type: "Concat"', [(2, 3, 4), (2, 3)], 1, "bottom 1 has shape (2, 3), bottom 0 (2, 3, 4)"),
        ('type: "Slice"\nslice_param { axis: 1 @slice_dim: 1 }', [(2, 4)], 2, "both axis and slice_dim are given"),
        ('type: "Slice"\nslice_param { @axis: -3 }', [(2, 4)], 2, "axis -3 does not exist"),
        ('type: "Slice"', [(2, 4)], 3, "axis 1 has size 4, which does not divide into 3 tops"),
        ('type: "Slice"\nslice_param { @slice_point: 1 }', [(2, 4)], 3, "1 slice_point value(s) for 3 top(s)"),
        ('type: "Slice"\nslice_param { slice_point: 2 @slice_point: 2 }', [(2, 4)], 3, "slice_point 2 follows 2"),
        ('type: "Slice"\nslice_param { @slice_point: 0 }', [(2, 4)], 2, "slice_point 0 follows 0"),
        ('type: "Slice"\nslice_param { @slice_point: 4 }', [(2, 4)], 2, "slice_point 4 leaves nothing of 4 for the last top"),
        ('type: "Slice"\nslice_param { @slice_point: 5 }', [(2, 4)], 2, "slice_point 5 leaves nothing of 4"),
    ],
)
def test_concat_and_slice_refusals(text: str, shapes: list[tuple[int, ...]], tops: int, message: str) -> None:
    assert message in refusal(text, shapes, tops=tops)


def test_layers_that_move_values_keep_their_type() -> None:
    for text in ('type: "Concat"', 'type: "Slice"', 'type: "Split"', 'type: "Flatten"', 'type: "Reshape" reshape_param { shape { dim: -1 } }'):
        assert make_layer(text).top_dtypes(["float32"], "bfloat16") == ["float32"]
    assert make_layer('type: "Concat"', bottoms=2).top_dtypes(["float32", "bfloat16"], "bfloat16") == ["bfloat16"]


# --- Split and Silence -----------------------------------------------------------------------------------------------


def test_split_adds_up_gradients(backend: Backend, rng: np.random.Generator) -> None:
    x, dys = rng.standard_normal((2, 3, 4, 5)), [rng.standard_normal((2, 3, 4, 5)) for _ in range(3)]
    rig = Rig(backend, 'type: "Split"', [x], tops=3)
    for got in rig.forward():
        close(got, x)
    close(rig.backward(*dys, poison=False)[0], sum(dys))


def test_silence_gives_no_gradient(backend: Backend, rng: np.random.Generator) -> None:
    rig = Rig(backend, 'type: "Silence"', [rng.standard_normal((2, 3)), rng.standard_normal(4)], tops=0)
    assert rig.forward() == []
    got = rig.backward(down=[True, False])
    close(got[0], np.zeros((2, 3)))
    assert np.isnan(got[1]).all()


# --- Flatten and Reshape ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "bottom", "top"),
    [
        ('type: "Flatten"', (2, 3, 4, 5), (2, 60)),
        ('type: "Flatten" flatten_param { axis: 0 }', (2, 3, 4, 5), (120,)),
        ('type: "Flatten" flatten_param { axis: 1 end_axis: 2 }', (2, 3, 4, 5), (2, 12, 5)),
        ('type: "Flatten" flatten_param { axis: -2 end_axis: -2 }', (2, 3, 4, 5), (2, 3, 4, 5)),
        ('type: "Reshape" reshape_param { shape { dim: 0 dim: -1 } }', (2, 3, 4, 5), (2, 60)),
        ('type: "Reshape" reshape_param { shape { dim: 0 dim: 0 dim: 2 dim: -1 } }', (2, 3, 4, 5), (2, 3, 2, 10)),
        ('type: "Reshape" reshape_param { shape { dim: 6 dim: 2 dim: 2 dim: 5 } }', (2, 3, 4, 5), (6, 2, 2, 5)),
        ('type: "Reshape" reshape_param { shape { dim: 2 dim: -1 } axis: 1 num_axes: 2 }', (2, 3, 4, 5), (2, 2, 6, 5)),
        ('type: "Reshape" reshape_param { shape { dim: 1 } axis: -1 num_axes: 0 }', (2, 3), (2, 3, 1)),
        ('type: "Reshape" reshape_param { shape { dim: 1 dim: 1 } axis: 1 num_axes: 0 }', (2, 3), (2, 1, 1, 3)),
        ('type: "Reshape" reshape_param { shape { } }', (1, 1), ()),
        ('type: "Reshape" reshape_param { shape { dim: -1 } axis: -2 }', (2, 3, 4), (2, 3, 4)),
    ],
)
def test_the_same_values_in_another_shape(backend: Backend, rng: np.random.Generator, text: str, bottom: tuple[int, ...], top: tuple[int, ...]) -> None:
    x, dy = rng.standard_normal(bottom), rng.standard_normal(top)
    rig = Rig(backend, text, [x])
    close(rig.forward()[0], x.reshape(top))
    close(rig.backward(dy)[0], dy.reshape(bottom))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('type: "Flatten"\nflatten_param { @axis: 4 }', "axis 4 does not exist"),
        ('type: "Flatten"\nflatten_param { @end_axis: -5 }', "axis -5 does not exist"),
        ('type: "Flatten"\nflatten_param { axis: 2 @end_axis: 1 }', "end_axis 1 comes before axis 2"),
        ('type: "Reshape"\nreshape_param { shape { dim: -1 @dim: -1 } }', "a second -1 in shape"),
        ('type: "Reshape"\nreshape_param { shape { @dim: -2 } }', "dim -2 in shape"),
        ('type: "Reshape"\nreshape_param { @shape { dim: 7 dim: -1 } }', "120 values of shape (2, 3, 4, 5) do not divide by the 7"),
        ('type: "Reshape"\nreshape_param { @shape { dim: 2 dim: 3 } }', "has 120 values, the new shape (2, 3) 6"),
        ('type: "Reshape"\nreshape_param { shape { dim: 0 dim: 0 dim: 0 dim: 0 @dim: 0 } }', "dim 0 copies axis 4 of a bottom with 4 axes"),
        ('type: "Reshape"\nreshape_param { @axis: 5 }', "axis 5 does not exist"),
        ('type: "Reshape"\nreshape_param { @axis: -6 }', "axis -6 does not exist"),
        ('type: "Reshape"\nreshape_param { axis: 3 @num_axes: 2 }', "axis 3 and num_axes 2 reach past the 4 axes"),
        ('type: "Reshape"\nreshape_param { @num_axes: -2 }', "num_axes is -2"),
        ('type: "Reshape"', "has 120 values, the new shape () 1"),
    ],
)
def test_flatten_and_reshape_refusals(text: str, message: str) -> None:
    assert message in refusal(text)


# --- Eltwise -----------------------------------------------------------------------------------------------------------


def test_eltwise_sum(backend: Backend, rng: np.random.Generator) -> None:
    xs, dy = [rng.standard_normal((2, 3, 4, 5)) for _ in range(3)], rng.standard_normal((2, 3, 4, 5))
    rig = Rig(backend, 'type: "Eltwise" eltwise_param { coeff: 2 coeff: -0.5 coeff: 1 }', xs)
    close(rig.forward()[0], 2 * xs[0] - 0.5 * xs[1] + xs[2])
    for got, want in zip(rig.backward(dy), (2 * dy, -0.5 * dy, dy)):
        close(got, want)
    close(Rig(backend, 'type: "Eltwise"', xs).forward()[0], xs[0] + xs[1] + xs[2])


@pytest.mark.parametrize("stable", ["true", "false"])
def test_eltwise_product(backend: Backend, rng: np.random.Generator, stable: str) -> None:
    xs, dy = [rng.uniform(0.5, 2, (2, 3, 4, 5)) for _ in range(3)], rng.standard_normal((2, 3, 4, 5))
    rig = Rig(backend, f'type: "Eltwise" eltwise_param {{ operation: PROD stable_prod_grad: {stable} }}', xs)
    close(rig.forward()[0], xs[0] * xs[1] * xs[2])
    for got, want in zip(rig.backward(dy), (dy * xs[1] * xs[2], dy * xs[0] * xs[2], dy * xs[0] * xs[1])):
        close(got, want)


def test_eltwise_product_at_zero(backend: Backend) -> None:
    xs = [np.array([0.0, 2.0]), np.array([3.0, 4.0])]
    stable = Rig(backend, 'type: "Eltwise" eltwise_param { operation: PROD }', xs)
    stable.forward()
    np.testing.assert_array_equal(stable.backward(np.ones(2))[0], [3, 4])
    quotient = Rig(backend, 'type: "Eltwise" eltwise_param { operation: PROD stable_prod_grad: false }', xs)
    quotient.forward()
    np.testing.assert_array_equal(quotient.backward(np.ones(2))[0], [np.nan, 4])  # 0/0, as in Caffe


def test_eltwise_max_gives_ties_of_the_first_two_to_the_second(backend: Backend) -> None:
    xs = [np.array([1.0, 5, 2, 2]), np.array([1.0, 3, 4, 2]), np.array([0.0, 5, 4, 3])]
    rig = Rig(backend, 'type: "Eltwise" eltwise_param { operation: MAX coeff: 1 coeff: 2 coeff: 3 }', xs)
    np.testing.assert_array_equal(rig.forward()[0], [1, 5, 4, 3])
    for got, want in zip(rig.backward(np.array([1.0, 2, 3, 4])), ([0, 2, 0, 0], [1, 0, 3, 0], [0, 0, 0, 4])):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("fields", ["coeff: 2 coeff: -1", "operation: PROD", "operation: PROD stable_prod_grad: false", "operation: MAX"])
def test_eltwise_gradient_check(rng: np.random.Generator, fields: str) -> None:
    check_gradient(f'type: "Eltwise" eltwise_param {{ {fields} }}', list(all_different(rng, 2, 2, 3, 2)))


@pytest.mark.parametrize(
    ("fields", "shapes", "message"),
    [
        ("operation: PROD @coeff: 1 coeff: 2", [(2, 3), (2, 3)], "coeff is given for a product"),
        ("@coeff: 1 coeff: 2", [(2, 3)] * 3, "2 coeff value(s) for 3 bottoms"),
        ("", [(2, 3), (3, 2)], "bottom 1 has shape (3, 2), bottom 0 (2, 3)"),
        ("operation: MAX", [(2,)] * 257, "MAX of 257 bottoms"),
    ],
)
def test_eltwise_refusals(fields: str, shapes: list[tuple[int, ...]], message: str) -> None:
    assert message in refusal(f'type: "Eltwise"\neltwise_param {{ {fields} }}', shapes)
