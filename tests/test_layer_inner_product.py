"""InnerProduct: shapes, refusals, and values and gradients on bottoms of any number of axes."""

from __future__ import annotations

import numpy as np
import pytest
from layer_harness import Rig, check_gradient, close, make_layer, refusal, shapes_of

from caffelite.backends.contract import Backend
from caffelite.layer import BOTTOM


def text(fields: str) -> str:
    return f'type: "InnerProduct"\ninner_product_param {{ {fields} }}'


@pytest.mark.parametrize(
    ("fields", "bottom", "top", "weight"),
    [
        ("", (2, 3), (2, 5), (5, 3)),
        ("", (2, 3, 4, 6), (2, 5), (5, 72)),
        ("transpose: true", (2, 3, 4, 6), (2, 5), (72, 5)),
        ("axis: 2", (2, 3, 4, 6), (2, 3, 5), (5, 24)),
        ("axis: -1", (2, 3, 4, 6), (2, 3, 4, 5), (5, 6)),
        ("axis: 0", (2, 3), (5,), (5, 6)),
    ],
)
def test_shapes(fields: str, bottom: tuple[int, ...], top: tuple[int, ...], weight: tuple[int, ...]) -> None:
    layer = make_layer(text(f"num_output: 5 {fields} weight_filler {{ type: 'xavier' }}"))
    assert layer.infer_shapes([bottom]) == [top]
    specs = layer.param_specs([bottom])
    assert [s.shape for s in specs] == [weight, (5,)]
    assert specs[0].filler.type == "xavier"
    assert layer.multiply_adds([bottom]) == int(np.prod(bottom)) * 5


def test_refusals() -> None:
    assert "num_output is missing or 0" in refusal(text("@num_output: 0"))
    assert "num_output is missing or 0" in refusal('@type: "InnerProduct"'.replace("@", ""))
    assert "axis 4 does not exist in a bottom with 4 axes" in refusal(text("num_output: 5 @axis: 4"))
    assert "choose -4 to 3" in refusal(text("num_output: 5 @axis: -5"))
    assert "a bottom without axes has none" in refusal(text("num_output: 5 @axis: 0"), [()])
    assert shapes_of(text("num_output: 5 axis: 3"), (2, 3, 4, 6)) == [(2, 3, 4, 5)]
    assert shapes_of(text("num_output: 1 axis: -4"), (2, 3, 4, 6)) == [(1,)]


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
    ("axis", "shape"), [(1, (2, 7)), (1, (3, 4, 3, 5)), (1, (3, 4, 1, 1)), (1, (3, 1, 4, 5)), (2, (2, 3, 4)), (2, (2, 3, 4, 2)), (3, (2, 3, 2, 4)), (0, (2, 3))]
)
def test_values_and_gradients(backend: Backend, rng: np.random.Generator, axis: int, shape: tuple[int, ...], transpose: bool) -> None:
    x = rng.standard_normal(shape)
    flat = x.reshape(int(np.prod(shape[:axis])), -1)  # rows in Caffe's order
    w, b = rng.standard_normal((5, flat.shape[1])), rng.standard_normal(5)
    rig = Rig(backend, text(f"num_output: 5 axis: {axis} transpose: {str(transpose).lower()}"), [x], [w.T if transpose else w, b])
    top = (*shape[:axis], 5)
    close(rig.forward()[0], (flat @ w.T + b).reshape(top))
    dy = rng.standard_normal((flat.shape[0], 5))
    close(rig.backward(dy.reshape(top))[0], (dy @ w).reshape(shape))
    dw, db = rig.gradients()
    close(dw, (dy.T @ flat).T if transpose else dy.T @ flat)
    close(db, dy.sum(axis=0))


def test_a_spatial_bottom_is_kept_as_a_copy_only_where_memory_order_asks_for_it() -> None:
    for shape, copied in [((2, 3, 4, 5), True), ((2, 3, 1, 1), False), ((2, 1, 4, 5), False), ((2, 12), False)]:
        layer = make_layer(text("num_output: 5"))
        layer.infer_shapes([shape])
        assert ("x" in layer.buffer_specs([shape], ["float32"], None)) == copied  # type: ignore[arg-type]
        assert (BOTTOM in layer.backward_reads()) != copied


def test_accumulation_and_skipping(backend: Backend, rng: np.random.Generator) -> None:
    x, w, b = rng.standard_normal((3, 4)), rng.standard_normal((5, 4)), rng.standard_normal(5)
    rig, dy = Rig(backend, text("num_output: 5"), [x], [w, b]), rng.standard_normal((3, 5))
    rig.forward()
    rig.layer.params[1].learn = False
    assert np.isnan(rig.backward(dy, down=[False])[0]).all()
    assert np.isnan(rig.gradients()[1]).all()
    rig.layer.params[0].accumulate = True
    rig.backward(dy, poison=False)
    close(rig.gradients()[0], 2 * dy.T @ x)


def test_nothing_is_computed_for_frozen_parameters(backend: Backend, rng: np.random.Generator) -> None:
    rig = Rig(backend, text("num_output: 5 bias_term: false"), [rng.standard_normal((3, 4))], [rng.standard_normal((5, 4))])
    rig.forward()
    rig.layer.params[0].learn = False
    assert not np.isnan(rig.backward(np.ones((3, 5)))[0]).any()
    assert np.isnan(rig.gradients()[0]).all()


def test_relu_may_be_computed_along(backend: Backend, rng: np.random.Generator) -> None:
    x, w, b = rng.standard_normal((3, 4)), rng.standard_normal((5, 4)), rng.standard_normal(5)
    rig = Rig(backend, text("num_output: 5"), [x], [w, b])
    rig.layer.relu = True  # type: ignore[attr-defined]
    close(rig.forward()[0], np.maximum(x @ w.T + b, 0))


@pytest.mark.parametrize("fields", ["", "transpose: true axis: 2", "bias_term: false"])
def test_gradient_check(rng: np.random.Generator, fields: str) -> None:
    columns = 2 * 2 if "axis: 2" in fields else 3 * 2 * 2
    weight = (columns, 2) if "transpose" in fields else (2, columns)
    params = [rng.standard_normal(weight)] + ([] if "bias_term" in fields else [rng.standard_normal(2)])
    check_gradient(text(f"num_output: 2 {fields}"), [rng.standard_normal((2, 3, 2, 2))], params)
