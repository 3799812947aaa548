"""Input and DummyData, and what all layers have in common: every type is registered and tells unfit fields."""

from __future__ import annotations

import numpy as np
import pytest
from layer_harness import Rig, make_layer, refusal, shapes_of

from caffelite.backends.contract import Backend
from caffelite.errors import SpecError
from caffelite.layer import known_types

SOURCES, PAIRS = ["Input", "DummyData"], ["Accuracy", "Eltwise", "EuclideanLoss", "SoftmaxWithLoss"]
ACTIVATIONS = ["Dropout", "ELU", "PReLU", "Power", "ReLU", "Sigmoid", "Softmax", "TanH"]
OTHERS = ["BatchNorm", "Bias", "Concat", "Convolution", "Flatten", "InnerProduct", "LRN", "Pooling", "Reshape", "Scale", "Silence", "Slice", "Split"]
TYPES = [*SOURCES, *PAIRS, *ACTIVATIONS, *OTHERS]


def test_all_types_are_registered() -> None:
    assert set(TYPES) <= set(known_types())


@pytest.mark.parametrize("kind", TYPES)
def test_fields_of_another_type_are_refused(kind: str) -> None:
    bottoms = 0 if kind in SOURCES else 2 if kind in PAIRS else 1
    with pytest.raises(SpecError, match=f"embed_param does not belong to a {kind} layer"):
        make_layer(f'type: "{kind}" embed_param {{ num_output: 3 }}', bottoms=bottoms, tops=0 if kind == "Silence" else 1)


COUNTS = {  # least and most bottoms, least and most tops; 9: no limit tested
    (0, 0, 1, 9): SOURCES,
    (1, 1, 1, 1): [*ACTIVATIONS, "BatchNorm", "Flatten", "InnerProduct", "LRN", "Reshape"],
    (1, 1, 1, 2): ["Pooling"],
    (1, 1, 1, 9): ["Slice", "Split"],
    (1, 2, 1, 1): ["Bias", "Scale"],
    (1, 9, 0, 0): ["Silence"],
    (1, 9, 1, 1): ["Concat"],
    (2, 2, 1, 1): ["EuclideanLoss", "SoftmaxWithLoss"],
    (2, 2, 1, 2): ["Accuracy"],
    (2, 9, 1, 1): ["Eltwise"],
}


@pytest.mark.parametrize(("kind", "limits"), [(kind, limits) for limits, kinds in COUNTS.items() for kind in kinds])
def test_numbers_of_bottoms_and_tops(kind: str, limits: tuple[int, int, int, int]) -> None:
    least_bottoms, most_bottoms, least_tops, most_tops = limits
    fields = {"InnerProduct": "inner_product_param { num_output: 1 }", "Pooling": "pooling_param { global_pooling: true }"}.get(kind, "")
    for bottoms, tops in [(least_bottoms, least_tops), (most_bottoms, most_tops)]:
        make_layer(f'type: "{kind}" {fields}', bottoms=bottoms, tops=tops)
    for bottoms, tops, noun in [(least_bottoms - 1, least_tops, "bottom"), (most_bottoms + 1, least_tops, "bottom"), (least_bottoms, most_tops + 1, "top")]:
        if bottoms >= 0 and bottoms != 10 and tops != 10:
            with pytest.raises(SpecError, match=rf"{kind} takes .* {noun}\(s\), found"):
                make_layer(f'type: "{kind}" {fields}', bottoms=bottoms, tops=tops)


def test_convolution_takes_as_many_tops_as_bottoms() -> None:
    with pytest.raises(SpecError, match="as many tops as bottoms, found 2 bottom"):
        make_layer('type: "Convolution"', bottoms=2)


# --- Input -----------------------------------------------------------------------------------------------------------


def test_input_shapes() -> None:
    assert shapes_of('type: "Input" input_param { shape { dim: 2 dim: 3 } }', tops=2) == [(2, 3), (2, 3)]
    assert shapes_of('type: "Input" input_param { shape { dim: 2 dim: 3 } shape { dim: 2 } }', tops=2) == [(2, 3), (2,)]
    assert shapes_of('type: "Input" input_param { shape { } }') == [()]
    assert make_layer('type: "Input" input_param { shape { dim: 2 } }', bottoms=0).top_dtypes([], "bfloat16") == ["float32"]


def test_input_refusals() -> None:
    assert "0 shape(s) for 1 top(s)" in refusal('type: "Input"', [])
    assert "2 shape(s) for 3 top(s)" in refusal('type: "Input"\ninput_param { @shape { dim: 2 } shape { dim: 2 } }', [], tops=3)
    assert "shape (2, 0) has a size below 1" in refusal('type: "Input"\ninput_param { shape { dim: 1 } @shape { dim: 2 dim: 0 } }', [], tops=2)


def test_input_leaves_its_tops_alone(backend: Backend) -> None:
    rig = Rig(backend, 'type: "Input" input_param { shape { dim: 2 dim: 3 } }', [])
    backend.fill(rig.tops[0].data, 4.0)
    np.testing.assert_array_equal(rig.forward()[0], np.full((2, 3), 4.0))
    assert rig.layer.persistent_tops


# --- DummyData ---------------------------------------------------------------------------------------------------------


def dummy(fields: str) -> str:
    return f'type: "DummyData"\ndummy_data_param {{ {fields} }}'


def test_dummy_data_shapes() -> None:
    assert shapes_of(dummy("shape { dim: 2 dim: 3 }"), tops=2) == [(2, 3), (2, 3)]
    assert shapes_of(dummy("shape { dim: 2 } shape { dim: 4 dim: 5 }"), tops=2) == [(2,), (4, 5)]
    assert shapes_of(dummy("num: 2 channels: 3 height: 4 width: 5"), tops=2) == [(2, 3, 4, 5)] * 2
    assert shapes_of(dummy("num: 2 num: 6 channels: 3 height: 4 width: 5 width: 7"), tops=2) == [(2, 3, 4, 5), (6, 3, 4, 7)]


def test_constants_are_filled_once_and_the_rest_in_each_forward(backend: Backend) -> None:
    fillers = 'data_filler { value: 3 } data_filler { type: "uniform" min: 2 max: 5 }'
    rig = Rig(backend, dummy(f"shape {{ dim: 40 dim: 3 dim: 2 dim: 2 }} {fillers}"), [], tops=2)
    assert rig.layer.persistent_tops
    constant, first = rig.forward()
    np.testing.assert_array_equal(constant, np.full((40, 3, 2, 2), 3.0))
    assert first.min() >= 2
    assert first.max() <= 5
    assert abs(first.mean() - 3.5) < 5 * (9 / 12 / first.size) ** 0.5
    backend.fill(rig.tops[0].data, 8.0)  # a caller's own values stay
    rig.layer.context.forward_count = 1
    constant, second = rig.forward()
    assert constant.min() == 8
    assert not np.array_equal(first, second)
    rig.layer.context.forward_count = 0
    np.testing.assert_array_equal(rig.forward()[1], first)
    rig.layer.context.seed = 1
    assert not np.array_equal(rig.forward()[1], first)


def test_dummy_data_is_zero_without_a_filler(backend: Backend) -> None:
    rig = Rig(backend, dummy("shape { dim: 2 dim: 3 }"), [], tops=2)
    assert all((top == 0).all() for top in rig.forward())
    assert not make_layer(dummy('shape { dim: 2 } data_filler { type: "gaussian" }'), bottoms=0).persistent_tops


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("@shape { dim: 2 } shape { dim: 2 }", "2 shape(s) for 3 top(s)"),
        ("shape { dim: 2 } @num: 2", "both shape and num are given"),
        ("num: 2 channels: 3 height: 4", "0 value(s) of width for 3 top(s)"),
        ("@num: 2 num: 3 channels: 3 height: 4 width: 5", "2 value(s) of num for 3 top(s)"),
        ("shape { dim: 2 } @data_filler { } data_filler { }", "2 data_filler(s) for 3 top(s)"),
        ("@shape { dim: 0 }", "shape (0,) has a size below 1"),
        ("", "0 shape(s) for 3 top(s)"),
    ],
)
def test_dummy_data_refusals(fields: str, message: str) -> None:
    assert message in refusal(dummy(fields), [], tops=3)


def test_a_filler_that_does_not_exist(backend: Backend) -> None:
    rig = Rig(backend, dummy('shape { dim: 2 }\ndata_filler { type: "uniformm" }'), [])
    with pytest.raises(SpecError, match="uniform") as caught:
        rig.forward()
    assert caught.value.where is not None
    assert caught.value.where.line == 4
