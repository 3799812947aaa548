"""Softmax, SoftmaxWithLoss, EuclideanLoss, Accuracy: values, gradients, normalisation, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from layer_harness import Rig, check_gradient, close, make_layer, refusal

from caffelite.backends.contract import Backend
from caffelite.errors import DataError


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


# --- Softmax -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("axis", "shape"), [(1, (4, 7)), (1, (2, 5, 3, 4)), (-1, (2, 5, 3, 4)), (0, (6,))])
def test_softmax(backend: Backend, rng: np.random.Generator, axis: int, shape: tuple[int, ...], in_place: bool) -> None:
    x, dy = 5 * rng.standard_normal(shape), rng.standard_normal(shape)
    rig = Rig(backend, f'type: "Softmax" softmax_param {{ axis: {axis} engine: CUDNN }}', [x], in_place=in_place)
    y = softmax(x, axis)
    close(rig.forward()[0], y)
    close(rig.backward(dy)[0], y * (dy - (dy * y).sum(axis=axis, keepdims=True)))


def test_softmax_gradient_check_and_refusal(rng: np.random.Generator) -> None:
    check_gradient('type: "Softmax"', [rng.standard_normal((2, 4, 2))])
    assert "axis 1 does not exist in a bottom with 1 axes" in refusal('type: "Softmax"', [(4,)])
    assert "axis 4 does not exist" in refusal('type: "Softmax"\nsoftmax_param { @axis: 4 }')


# --- SoftmaxWithLoss -------------------------------------------------------------------------------------------------

DIVISORS = {"": 20, "normalization: VALID": 20, "normalization: FULL": 24, "normalization: BATCH_SIZE": 2, "normalization: NONE": 1}
DIVISORS |= {"normalize: true": 20, "normalize: false": 2, "normalize: false normalization: FULL": 24}


@pytest.mark.parametrize("fields", DIVISORS)
def test_softmax_loss(backend: Backend, rng: np.random.Generator, fields: str) -> None:
    x, label = 3 * rng.standard_normal((2, 5, 3, 4)), rng.integers(0, 5, (2, 3, 4)).astype(float)
    label[0, 0] = 9  # ignored, though no class has that number
    valid, p = label != 9, softmax(x, 1)
    hot = np.arange(5)[None, :, None, None] == label[:, None]
    rig = Rig(backend, f'type: "SoftmaxWithLoss" loss_param {{ ignore_label: 9 {fields} }}', [x, label])
    close(rig.forward()[0], -np.log((p * hot).sum(axis=1)[valid]).sum() / DIVISORS[fields])
    assert rig.tops[0].shape == ()
    got = rig.backward(0.5, down=[True, False])
    close(got[0], (p - hot) * valid[:, None] * 0.5 / DIVISORS[fields])


def test_softmax_loss_of_another_axis_and_any_shape_of_labels(backend: Backend, rng: np.random.Generator) -> None:
    x, label = rng.standard_normal((3, 2, 4)), rng.integers(0, 4, (3, 2, 1, 1)).astype(float)
    rig = Rig(backend, 'type: "SoftmaxWithLoss" softmax_param { axis: -1 }', [x, label])
    p = softmax(x, 2).reshape(6, 4)
    close(rig.forward()[0], -np.log(p[np.arange(6), label.ravel().astype(int)]).mean())


def test_softmax_loss_clamps_and_never_divides_by_zero(backend: Backend) -> None:
    rig = Rig(backend, 'type: "SoftmaxWithLoss"', [np.array([[0.0, 200.0]]), np.array([0.0])])
    close(rig.forward()[0], -np.log(np.finfo(np.float32).tiny))
    np.testing.assert_array_equal(rig.backward(1.0, down=[True, False])[0], [[-1, 1]])  # as if nothing were clamped
    rig = Rig(backend, 'type: "SoftmaxWithLoss" loss_param { ignore_label: 0 }', [np.zeros((2, 2)), np.zeros(2)])
    close(rig.forward()[0], np.zeros(()))
    close(rig.backward(1.0, down=[True, False])[0], np.zeros((2, 2)))


@pytest.mark.parametrize("label", [-1, 3, 1e9, np.nan])
def test_labels_outside_the_classes_are_refused(backend: Backend, label: float) -> None:
    for kind in ("SoftmaxWithLoss", "Accuracy"):
        rig = Rig(backend, f'type: "{kind}"', [np.zeros((2, 3)), np.array([0.0, label])])
        with pytest.raises(DataError, match="label"):
            rig.forward()


def test_softmax_loss_gradient_check(rng: np.random.Generator) -> None:
    values = [rng.standard_normal((2, 4, 3)), rng.integers(0, 4, (2, 3)).astype(float)]
    check_gradient('type: "SoftmaxWithLoss" loss_param { ignore_label: 2 }', values, check=[0])


# --- EuclideanLoss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape_a", "shape_b"), [((4, 3), (4, 3)), ((2, 3, 4, 5), (2, 3, 4, 5)), ((2, 12), (2, 3, 2, 2)), ((2, 3, 2, 2), (2, 12)), ((4,), (4, 1, 1, 1))]
)
def test_euclidean_loss_pairs_values_in_caffes_order(backend: Backend, rng: np.random.Generator, shape_a: tuple[int, ...], shape_b: tuple[int, ...]) -> None:
    a, b = rng.standard_normal(shape_a), rng.standard_normal(shape_b)
    rig = Rig(backend, 'type: "EuclideanLoss"', [a, b])
    difference = a - b.reshape(shape_a)
    close(rig.forward()[0], (difference**2).sum() / (2 * shape_a[0]))
    da, db = rig.backward(3.0)
    close(da, 3 * difference / shape_a[0])
    close(db, -3 * difference.reshape(shape_b) / shape_a[0])


def test_euclidean_loss_gradient_check_and_refusals(rng: np.random.Generator) -> None:
    check_gradient('type: "EuclideanLoss"', [rng.standard_normal((2, 3, 2, 2)), rng.standard_normal((2, 3, 2, 2))])
    for a, b in [((2, 3), (3, 2)), ((2, 3), (2, 4)), ((), ())]:
        assert f"bottoms have shapes {a} and {b}" in refusal('type: "EuclideanLoss"', [a, b])


# --- Accuracy ----------------------------------------------------------------------------------------------------------

SCORES = np.array([[0.1, 0.7, 0.2], [0.5, 0.1, 0.4], [0.3, 0.3, 0.4], [0.2, 0.6, 0.2]])
LABELS = np.array([1.0, 2, 2, 0])


@pytest.mark.parametrize(
    ("fields", "want", "per_class"),
    [
        ("", 0.5, [0, 1, 0.5]),
        ("top_k: 2", 0.75, [0, 1, 1]),  # row 3: class 0 ties with class 2, below class 1
        ("top_k: 3", 1, [1, 1, 1]),
        ("ignore_label: 0", 2 / 3, [0, 1, 0.5]),
    ],
)
def test_accuracy(backend: Backend, fields: str, want: float, per_class: list[float]) -> None:
    rig = Rig(backend, f'type: "Accuracy" accuracy_param {{ {fields} }}', [SCORES, LABELS], tops=2)
    got = rig.forward()
    close(got[0], np.array(want))
    close(got[1], np.array(per_class))


def test_accuracy_of_ties_nan_and_nothing(backend: Backend) -> None:
    def accuracy(scores: np.ndarray, labels: np.ndarray, fields: str = "") -> float:
        return float(Rig(backend, f'type: "Accuracy" accuracy_param {{ {fields} }}', [scores, labels]).forward()[0])

    assert accuracy(np.zeros((4, 3)), np.array([0.0, 1, 2, 0])) == 0
    assert accuracy(np.array([[np.nan, 5.0, 6.0]]), np.array([0.0])) == 1
    assert accuracy(np.zeros((2, 3)), np.ones(2), "ignore_label: 1") == 0
    scores = np.moveaxis(SCORES.reshape(2, 2, 3), 2, 1)  # classes on axis 1 of (2,3,2)
    assert accuracy(scores, LABELS.reshape(2, 2)) == 0.5
    assert accuracy(SCORES.reshape(2, 2, 1, 3), LABELS.reshape(2, 2), "axis: -1") == 0.5


def test_accuracy_has_no_gradient() -> None:
    layer = make_layer('type: "Accuracy"', bottoms=2)
    assert layer.differentiable == ()
    assert layer.top_dtypes(["bfloat16", "float32"], "bfloat16") == ["float32"]


@pytest.mark.parametrize("kind", ["SoftmaxWithLoss", "Accuracy"])
def test_label_shapes_are_checked(kind: str) -> None:
    for scores, labels in [((2, 3), (3,)), ((2, 3), (2, 3)), ((2, 3, 4, 4), (2,)), ((4, 3), (2, 2))]:
        assert f"bottom 1 has shape {labels}" in refusal(f'type: "{kind}"', [scores, labels])


def test_other_refusals() -> None:
    assert "top_k is 4, but there are 3 classes" in refusal('type: "Accuracy"\naccuracy_param { @top_k: 4 }', [(2, 3), (2,)])
    assert "top_k is 0" in refusal('type: "Accuracy"\naccuracy_param { @top_k: 0 }', [(2, 3), (2,)])
    assert "axis 2 does not exist" in refusal('type: "Accuracy"\naccuracy_param { @axis: 2 }', [(2, 3), (2,)])
    assert "axis 2 does not exist" in refusal('type: "SoftmaxWithLoss"\nsoftmax_param { @axis: 2 }', [(2, 3), (2,)])
