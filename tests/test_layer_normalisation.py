"""BatchNorm, Scale, Bias, LRN: values, statistics, gradients, in place, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from layer_harness import Rig, check_gradient, close, make_layer, refusal, shapes_of

from caffelite.backends.contract import Backend
from caffelite.schema import pb

EPS = 1e-5


def per_channel(v: np.ndarray, x: np.ndarray) -> np.ndarray:
    return v.reshape((1, -1) + (1,) * (x.ndim - 2))


# --- BatchNorm -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("shape", [(2, 3), (5, 3), (2, 3, 4, 5), (2, 3, 7)])
def test_batch_norm_of_a_batch(backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], in_place: bool) -> None:
    x, dy, axes = rng.normal(2, 3, shape), rng.standard_normal(shape), tuple(i for i in range(len(shape)) if i != 1)
    old = [rng.standard_normal(3), rng.uniform(1, 2, 3), np.array([4.0])]
    rig = Rig(backend, 'type: "BatchNorm" batch_norm_param { moving_average_fraction: 0.9 }', [x], old, in_place=in_place)
    mean, var, m = x.mean(axis=axes), x.var(axis=axes), x.size // 3
    y, root = (x - per_channel(mean, x)) / np.sqrt(per_channel(var, x) + EPS), np.sqrt(per_channel(var, x) + EPS)
    close(rig.forward()[0], y)
    for param, want in zip(rig.layer.params, [0.9 * old[0] + mean, 0.9 * old[1] + var * m / (m - 1), 0.9 * old[2] + 1]):
        close(rig.host(param.data), want)
    centred = dy - dy.mean(axis=axes, keepdims=True) - y * (dy * y).mean(axis=axes, keepdims=True)
    close(rig.backward(dy)[0], centred / root)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("weight", [2.5, 0.0])
def test_batch_norm_by_stored_statistics(backend: Backend, rng: np.random.Generator, weight: float, in_place: bool) -> None:
    x, dy = rng.standard_normal((2, 3, 4, 5)), rng.standard_normal((2, 3, 4, 5))
    stored = [rng.standard_normal(3), rng.uniform(1, 2, 3), np.array([weight])]
    factor = 1 / weight if weight else 0.0
    root = np.sqrt(per_channel(stored[1] * factor, x) + EPS)
    rig = Rig(backend, 'type: "BatchNorm"', [x], stored, phase=pb.TEST, in_place=in_place)
    close(rig.forward()[0], (x - per_channel(stored[0] * factor, x)) / root)
    close(rig.host(rig.layer.params[0].data), stored[0])  # left as it was
    close(rig.backward(dy)[0], dy / root)


def test_batch_norm_mode_follows_the_phase_unless_told() -> None:
    def is_global(fields: str, phase: int) -> bool:
        return "normalised" not in make_layer(f'type: "BatchNorm" {fields}', phase=phase).buffer_specs([(2, 3)], ["float32"], None)  # type: ignore[arg-type]

    told = ["batch_norm_param { use_global_stats: true }", "batch_norm_param { use_global_stats: false }"]
    assert [is_global("", pb.TRAIN), is_global("", pb.TEST)] == [False, True]
    assert [is_global(told[0], pb.TRAIN), is_global(told[1], pb.TEST)] == [True, False]


def test_batch_norm_of_one_value_a_channel_stores_its_variance_as_it_is(backend: Backend) -> None:
    rig = Rig(backend, 'type: "BatchNorm"', [np.array([[3.0, -1.0]])], [np.zeros(2), np.zeros(2), np.zeros(1)])
    close(rig.forward()[0], np.zeros((1, 2)))
    close(rig.host(rig.layer.params[1].data), np.zeros(2))


def test_batch_norm_parameters_and_refusals(rng: np.random.Generator) -> None:
    specs = make_layer('type: "BatchNorm"').param_specs([(2, 3, 4)])
    assert [(s.shape, s.learned, s.filler.value) for s in specs] == [((3,), False, 0), ((3,), False, 0), ((1,), False, 0)]
    text = 'type: "BatchNorm"\n'
    assert "lr_mult is 1 for a statistic" in refusal(text + "param { lr_mult: 0 } param {\n@lr_mult: 1 }")
    assert "moving_average_fraction is 1.5" in refusal(text + "batch_norm_param { @moving_average_fraction: 1.5 }")
    assert "eps is -1" in refusal(text + "batch_norm_param { @eps: -1 }")
    for fields in ("moving_average_fraction: 0", "moving_average_fraction: 1 eps: 0"):
        make_layer(f'type: "BatchNorm" batch_norm_param {{ {fields} }}')
    with pytest.raises(Exception, match="BatchNorm needs a bottom with at least 2 axes"):
        make_layer(text).infer_shapes([(4,)])
    rig_text = 'type: "BatchNorm" batch_norm_param { use_global_stats: false }'
    x = rng.standard_normal((3, 2, 2, 2))
    rig = Rig(_numpy(), rig_text, [x], [np.zeros(2), np.zeros(2), np.zeros(1)], dtype="float64")
    weights = rng.standard_normal(x.shape)
    rig.forward()
    analytic, step = rig.backward(weights)[0], 1e-5
    for place in np.ndindex(x.shape):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[place] += sign * step
            rig.set([moved])
            ends.append((weights * rig.forward()[0]).sum())
        assert abs((ends[0] - ends[1]) / (2 * step) - analytic[place]) < 1e-6


def _numpy() -> Backend:
    from caffelite.backends.numpy import NumpyBackend

    return NumpyBackend()


# --- Scale and Bias ------------------------------------------------------------------------------------------------

RUNS = [
    ("", (3,), 1),
    ("axis: 0 num_axes: 2", (2, 3), 0),
    ("num_axes: -1", (3, 4, 5), 1),
    ("axis: 0 num_axes: -1", (2, 3, 4, 5), 0),
    ("num_axes: 0", (), 1),
    ("axis: -2", (4,), 2),
]


def spread(v: np.ndarray, first: int, axes: int) -> np.ndarray:
    return v.reshape((1,) * first + v.shape + (1,) * (axes - first - v.ndim))


def summed(v: np.ndarray, first: int, shape: tuple[int, ...]) -> np.ndarray:
    return v.sum(axis=tuple(i for i in range(v.ndim) if not first <= i < first + len(shape)))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("fields", "shape", "first"), RUNS)
def test_scale(backend: Backend, rng: np.random.Generator, fields: str, shape: tuple[int, ...], first: int, in_place: bool) -> None:
    x, dy = rng.standard_normal((2, 3, 4, 5)), rng.standard_normal((2, 3, 4, 5))
    s, b = rng.standard_normal(shape), rng.standard_normal(shape)
    rig = Rig(backend, f'type: "Scale" scale_param {{ {fields} bias_term: true }}', [x], [s, b], in_place=in_place)
    close(rig.forward()[0], x * spread(s, first, 4) + spread(b, first, 4))
    close(rig.backward(dy)[0], dy * spread(s, first, 4))
    close(rig.gradients()[0], summed(dy * x, first, shape))
    close(rig.gradients()[1], summed(dy, first, shape))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("axis", "shape"), [(0, (2, 3)), (1, (3,)), (-1, (5,)), (0, (2, 3, 4, 5)), (2, ())])
def test_scale_by_a_second_bottom(backend: Backend, rng: np.random.Generator, axis: int, shape: tuple[int, ...], in_place: bool) -> None:
    x, dy, s, b = rng.standard_normal((2, 3, 4, 5)), rng.standard_normal((2, 3, 4, 5)), rng.standard_normal(shape), rng.standard_normal(shape)
    first = axis % 4 if shape else 0
    rig = Rig(backend, f'type: "Scale" scale_param {{ axis: {axis} bias_term: true }}', [x, s], [b], in_place=in_place)
    close(rig.forward()[0], x * spread(s, first, 4) + spread(b, first, 4))
    dx, ds = rig.backward(dy)
    close(dx, dy * spread(s, first, 4))
    close(ds, summed(dy * x, first, shape))
    close(rig.gradients()[0], summed(dy, first, shape))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("fields", "shape", "first"), RUNS)
def test_bias(backend: Backend, rng: np.random.Generator, fields: str, shape: tuple[int, ...], first: int, in_place: bool) -> None:
    x, dy, b = rng.standard_normal((2, 3, 4, 5)), rng.standard_normal((2, 3, 4, 5)), rng.standard_normal(shape)
    text, want = f'type: "Bias" bias_param {{ {fields} }}', x + spread(b, first, 4)
    rig = Rig(backend, text, [x], [b], in_place=in_place)
    close(rig.forward()[0], want)
    close(rig.backward(dy)[0], dy)
    close(rig.gradients()[0], summed(dy, first, shape))
    if "num_axes" not in fields:
        rig = Rig(backend, text, [x, b], in_place=in_place)
        close(rig.forward()[0], want)
        dx, db = rig.backward(dy)
        close(dx, dy)
        close(db, summed(dy, first, shape))


def test_scale_and_bias_of_a_blob_without_axes(backend: Backend) -> None:
    x, s = np.array(3.0), np.array(2.0)
    for kind, want in [("Scale", 6), ("Bias", 5)]:
        close(Rig(backend, f'type: "{kind}"', [x, s]).forward()[0], np.array(want))
        close(Rig(backend, f'type: "{kind}" {kind.lower()}_param {{ num_axes: 0 }}', [x], [s]).forward()[0], np.array(want))


def test_scale_and_bias_parameters() -> None:
    scale, bias = make_layer('type: "Scale" scale_param { bias_term: true bias_filler { value: 3 } }').param_specs([(2, 3, 4)])
    assert (scale.shape, scale.filler.value, bias.shape, bias.filler.value) == ((3,), 1, (3,), 3)
    assert make_layer('type: "Scale" scale_param { filler { type: "msra" } }').param_specs([(2, 3)])[0].filler.type == "msra"
    assert make_layer('type: "Scale"', bottoms=2).param_specs([(2, 3, 4), (3,)]) == []
    assert make_layer('type: "Bias"').param_specs([(2, 3, 4)])[0].filler.value == 0


@pytest.mark.parametrize("kind", ["scale", "bias"])
def test_scale_and_bias_refusals(kind: str) -> None:
    text = f'type: "{kind.title()}"\n{kind}_param {{ %s }}'
    assert "axis 4 does not exist in a bottom with 4 axes" in refusal(text % "@axis: 4")
    assert "axis 2 and num_axes 3 reach past the 4 axes" in refusal(text % "axis: 2 @num_axes: 3")
    assert "num_axes is -2" in refusal(text % "@num_axes: -2")
    assert "bottom 1 has shape (4,), which is no run of bottom 0's shape (2, 3, 4) from axis 1" in refusal(text % "", [(2, 3, 4), (4,)])
    assert "bottom 1 has shape (4, 5)" in refusal(text % "axis: 2", [(2, 3, 4), (4, 5)])


def test_scale_gradient_is_summed_over_passes_and_skipped_on_demand(backend: Backend, rng: np.random.Generator) -> None:
    x, dy = rng.standard_normal((2, 3, 4, 5)), rng.standard_normal((2, 3, 4, 5))
    rig = Rig(backend, 'type: "Scale" scale_param { bias_term: true }', [x], [rng.standard_normal(3), rng.standard_normal(3)])
    rig.forward()
    rig.backward(dy, poison=False)
    for param in rig.layer.params:
        param.accumulate = True
    rig.layer.params[1].learn = False
    rig.backward(dy, poison=False)
    close(rig.gradients()[0], 2 * (dy * x).sum(axis=(0, 2, 3)))
    close(rig.gradients()[1], dy.sum(axis=(0, 2, 3)))
    rig.layer.params[0].learn, rig.layer.params[1].learn = False, True
    rig.backward(dy)
    close(rig.gradients()[0], 2 * (dy * x).sum(axis=(0, 2, 3)))
    close(rig.gradients()[1], 2 * dy.sum(axis=(0, 2, 3)))


@pytest.mark.parametrize("text", ['type: "Scale" scale_param { bias_term: true }', 'type: "Scale" scale_param { axis: 0 num_axes: 2 bias_term: true }'])
def test_scale_gradient_check(rng: np.random.Generator, text: str) -> None:
    shape = (2, 3) if "num_axes" in text else (3,)
    check_gradient(text, [rng.standard_normal((2, 3, 2, 2))], [rng.standard_normal(shape), rng.standard_normal(shape)])
    check_gradient(text, [rng.standard_normal((2, 3, 2, 2)), rng.standard_normal(shape)], [rng.standard_normal(shape)])


# --- LRN -----------------------------------------------------------------------------------------------------------


def window_sums(v: np.ndarray, size: int, within: bool) -> np.ndarray:
    half, out = size // 2, np.zeros(v.shape)
    for n, c, h, w in np.ndindex(v.shape):
        if within:
            out[n, c, h, w] = v[n, c, max(h - half, 0) : h + half + 1, max(w - half, 0) : w + half + 1].sum()
        else:
            out[n, c, h, w] = v[n, max(c - half, 0) : c + half + 1, h, w].sum()
    return out


@pytest.mark.parametrize(
    ("fields", "size", "alpha", "beta", "k", "within"),
    [
        ("", 5, 1, 0.75, 1, False),
        ("local_size: 3 alpha: 0.5 beta: 0.6 k: 2 engine: CUDNN", 3, 0.5, 0.6, 2, False),
        ("local_size: 3 alpha: 0.5 beta: 0.6 k: 2 norm_region: WITHIN_CHANNEL", 3, 0.5, 0.6, 1, True),
    ],
)
def test_lrn(backend: Backend, rng: np.random.Generator, fields: str, size: int, alpha: float, beta: float, k: float, within: bool) -> None:
    x, dy = rng.standard_normal((2, 7, 4, 5)), rng.standard_normal((2, 7, 4, 5))
    cells = size * size if within else size
    s = k + alpha / cells * window_sums(x**2, size, within)
    y = x * s**-beta
    rig = Rig(backend, f'type: "LRN" lrn_param {{ {fields} }}', [x])
    close(rig.forward()[0], y)
    close(rig.backward(dy)[0], dy * s**-beta - 2 * alpha * beta / cells * x * window_sums(dy * y / s, size, within))
    assert rig.layer.multiply_adds([x.shape]) == x.size * cells


@pytest.mark.parametrize("fields", ["local_size: 3 k: 2", "local_size: 3 norm_region: WITHIN_CHANNEL"])
def test_lrn_gradient_check(rng: np.random.Generator, fields: str) -> None:
    check_gradient(f'type: "LRN" lrn_param {{ {fields} }}', [rng.standard_normal((2, 4, 2, 3))])


def test_lrn_refusals() -> None:
    assert "local_size is 4" in refusal('type: "LRN"\nlrn_param { @local_size: 4 }')
    assert "local_size is 0" in refusal('type: "LRN"\nlrn_param { @local_size: 0 }')
    with pytest.raises(Exception, match="LRN needs a bottom with 4 axes"):
        make_layer('type: "LRN"').infer_shapes([(2, 3, 4)])
    assert shapes_of('type: "LRN"', (2, 3, 4, 5)) == [(2, 3, 4, 5)]
