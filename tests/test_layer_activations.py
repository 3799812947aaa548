"""ReLU, PReLU, ELU, Sigmoid, TanH, Power, Dropout: values, gradients, in place, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from layer_harness import Rig, check_gradient, clear_of_zero, close, make_layer, refusal

from caffelite.backends.contract import Backend
from caffelite.layer import SIGN
from caffelite.schema import pb

FORMULAS = {
    'type: "ReLU"': (lambda x: np.maximum(x, 0), lambda x: x > 0),
    'type: "ReLU" relu_param { negative_slope: 0.25 engine: CUDNN }': (lambda x: np.where(x > 0, x, 0.25 * x), lambda x: np.where(x > 0, 1, 0.25)),
    'type: "ReLU" relu_param { negative_slope: -0.5 }': (lambda x: np.where(x > 0, x, -0.5 * x), lambda x: np.where(x > 0, 1, -0.5)),
    'type: "ELU"': (lambda x: np.where(x > 0, x, np.expm1(x)), lambda x: np.where(x > 0, 1, np.exp(x))),
    'type: "ELU" elu_param { alpha: 0.5 }': (lambda x: np.where(x > 0, x, 0.5 * np.expm1(x)), lambda x: np.where(x > 0, 1, 0.5 * np.exp(x))),
    'type: "ELU" elu_param { alpha: -2 }': (lambda x: np.where(x > 0, x, -2 * np.expm1(x)), lambda x: np.where(x > 0, 1, -2 * np.exp(x))),
    'type: "Sigmoid"': (lambda x: 1 / (1 + np.exp(-x)), lambda x: np.exp(-x) / (1 + np.exp(-x)) ** 2),
    'type: "TanH"': (np.tanh, lambda x: 1 / np.cosh(x) ** 2),
}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("text", FORMULAS)
def test_values_and_gradients(backend: Backend, rng: np.random.Generator, text: str, in_place: bool) -> None:
    function, slope = FORMULAS[text]
    x, dy = clear_of_zero(rng, 2, 3, 5, 7), rng.standard_normal((2, 3, 5, 7))
    rig = Rig(backend, text, [x], in_place=in_place)
    close(rig.forward()[0], function(x))
    close(rig.backward(dy)[0], dy * slope(x))


@pytest.mark.parametrize("text", [*FORMULAS, 'type: "Power" power_param { power: 2.5 scale: -0.5 shift: 3 }'])
def test_gradient_check(rng: np.random.Generator, text: str) -> None:
    check_gradient(text, [clear_of_zero(rng, 2, 3, 4)])


def test_what_a_relu_demands_of_layers_after_it() -> None:
    assert make_layer('type: "ReLU"').backward_reads() == {SIGN}
    assert make_layer('type: "ReLU"').keeps_sign
    assert not make_layer('type: "ReLU" relu_param { negative_slope: -1 }').keeps_sign
    assert make_layer('type: "Dropout"').keeps_sign


def test_relu_at_zero_nan_and_infinity(backend: Backend) -> None:
    rig = Rig(backend, 'type: "ReLU" relu_param { negative_slope: 0.5 }', [np.array([0.0, np.nan, np.inf, -np.inf])])
    np.testing.assert_array_equal(rig.forward()[0], [0, np.nan, np.inf, -np.inf])
    rig = Rig(backend, 'type: "ReLU" relu_param { negative_slope: 0.5 }', [np.zeros(2)])
    rig.forward()
    np.testing.assert_array_equal(rig.backward(np.array([2.0, -2.0]))[0], [1, -1])


@pytest.mark.parametrize(
    ("fields", "want", "slope"),
    [
        ("power: 2 scale: 3 shift: 1", lambda x: (1 + 3 * x) ** 2, lambda x: 6 * (1 + 3 * x)),
        ("scale: 3 shift: 1", lambda x: 1 + 3 * x, lambda x: np.full_like(x, 3)),
        ("power: 3", lambda x: x**3, lambda x: 3 * x**2),
        ("power: 0 shift: 5", np.ones_like, np.zeros_like),
        ("power: 3 scale: 0 shift: 2", lambda x: np.full_like(x, 8), np.zeros_like),
        ("power: 0.5 scale: 0.5 shift: 4", lambda x: (4 + 0.5 * x) ** 0.5, lambda x: 0.25 * (4 + 0.5 * x) ** -0.5),
    ],
)
def test_power(backend: Backend, rng: np.random.Generator, fields: str, want, slope) -> None:
    x, dy = clear_of_zero(rng, 2, 3, 5, 7), rng.standard_normal((2, 3, 5, 7))
    rig = Rig(backend, f'type: "Power" power_param {{ {fields} }}', [x])
    close(rig.forward()[0], want(x))
    close(rig.backward(dy)[0], dy * slope(x))


OTHERS = [
    'type: "BatchNorm"',
    'type: "Bias"',
    'type: "Scale"',
    'type: "LRN"',
    'type: "Softmax"',
    'type: "Dropout"',
    'type: "PReLU"',
    'type: "Power"',
    'type: "Flatten"',
]


@pytest.mark.parametrize("phase", [pb.TRAIN, pb.TEST])
@pytest.mark.parametrize("text", [*FORMULAS, *OTHERS])
def test_no_gradient_is_written_unasked(backend: Backend, rng: np.random.Generator, text: str, phase: int) -> None:
    x = clear_of_zero(rng, 2, 3, 4, 5)
    params = [rng.uniform(0.5, 1, spec.shape) for spec in make_layer(text, phase=phase).param_specs([x.shape])]
    rig = Rig(backend, text, [x], params, phase=phase)
    dy = rng.standard_normal(rig.forward()[0].shape)
    assert np.isnan(rig.backward(dy, down=[False])[0]).all()


# --- PReLU ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 4, 5)])
def test_prelu(backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], shared: bool, in_place: bool) -> None:
    x, dy = clear_of_zero(rng, *shape), rng.standard_normal(shape)
    a = rng.uniform(-1, 1, () if shared else (3,))
    spread = a if shared else a.reshape((3,) + (1,) * (len(shape) - 2))
    rig = Rig(backend, f'type: "PReLU" prelu_param {{ channel_shared: {str(shared).lower()} }}', [x], [a], in_place=in_place)
    close(rig.forward()[0], np.where(x > 0, x, spread * x))
    close(rig.backward(dy)[0], dy * np.where(x > 0, 1, spread))
    da = dy * x * (x <= 0)
    close(rig.gradients()[0], da.sum() if shared else da.sum(axis=tuple(i for i in range(x.ndim) if i != 1)))


def test_prelu_parameters_and_refusals(rng: np.random.Generator) -> None:
    spec = make_layer('type: "PReLU"').param_specs([(2, 3, 4)])[0]
    assert (spec.shape, spec.filler.type, spec.filler.value) == ((3,), "constant", 0.25)
    assert make_layer('type: "PReLU" prelu_param { filler { value: 0.5 } }').param_specs([(2, 3)])[0].filler.value == 0.5
    with pytest.raises(Exception, match="PReLU needs a bottom with at least 2 axes"):
        make_layer('type: "PReLU"').infer_shapes([(4,)])
    check_gradient('type: "PReLU"', [clear_of_zero(rng, 2, 3, 2)], [rng.uniform(0.1, 1, 3)])


# --- Dropout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [False, True])
def test_dropout_scales_what_it_keeps_and_sends_gradient_the_same_way(backend: Backend, rng: np.random.Generator, in_place: bool) -> None:
    x, dy = clear_of_zero(rng, 8, 16, 9, 9), rng.standard_normal((8, 16, 9, 9))
    rig = Rig(backend, 'type: "Dropout" dropout_param { dropout_ratio: 0.3 }', [x], in_place=in_place)
    y = rig.forward()[0]
    kept = y != 0
    assert abs(kept.mean() - 0.7) < 5 * (0.21 / x.size) ** 0.5
    close(y, np.where(kept, x / 0.7, 0))
    close(rig.backward(dy)[0], np.where(kept, dy / 0.7, 0))


def test_dropout_is_a_function_of_seed_layer_and_forward(backend: Backend) -> None:
    rig = Rig(backend, 'type: "Dropout"', [np.ones((64, 64))])

    def draw(seed: int, count: int, stream: int) -> bytes:
        rig.layer.context.seed, rig.layer.context.forward_count, rig.layer.stream = seed, count, stream
        return rig.forward()[0].tobytes()

    keys = [(1, 0, 7), (1, 1, 7), (2, 0, 7), (1, 0, 8)]
    assert len({draw(*key) for key in keys}) == 4
    assert draw(*keys[0]) == draw(*keys[0])


@pytest.mark.parametrize("in_place", [False, True])
def test_dropout_passes_everything_in_test(backend: Backend, rng: np.random.Generator, in_place: bool) -> None:
    x, dy = rng.standard_normal((2, 3)), rng.standard_normal((2, 3))
    rig = Rig(backend, 'type: "Dropout"', [x], phase=pb.TEST, in_place=in_place)
    assert rig.specs == {}
    close(rig.forward()[0], x)
    close(rig.backward(dy)[0], dy)


def test_dropout_of_nothing(backend: Backend, rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 5))
    close(Rig(backend, 'type: "Dropout" dropout_param { dropout_ratio: 0 }', [x]).forward()[0], x)


@pytest.mark.parametrize("ratio", ["1", "-0.1", "1.5", "nan"])
def test_dropout_refuses_ratios_outside_0_to_1(ratio: str) -> None:
    assert "dropout_ratio is" in refusal(f'type: "Dropout"\ndropout_param {{ @dropout_ratio: {ratio} }}')
