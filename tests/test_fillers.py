"""Fillers: bounds, moments and exact values against the formulas, and every refusal."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest

from caffelite.errors import SpecError
from caffelite.fillers import check_filler, fill
from caffelite.schema import parse_text, pb

Array = np.ndarray


def _fill(text: str, shape: tuple[int, ...], seed: int = 1) -> Array:
    filler = pb.FillerParameter()
    parse_text(text, filler)
    values = fill(filler, shape, np.random.default_rng(seed), SpecError)
    assert values.dtype == np.float32
    assert values.shape == shape
    assert values.flags.c_contiguous
    return values


def _check_uniform(values: Array, low: float, high: float) -> None:
    """Inside the bounds, reaching near both, and the mean and variance of U[low, high] within 5 standard errors."""
    width, count = high - low, values.size
    assert values.min() >= np.float32(low)
    assert values.max() <= np.float32(high)
    assert values.min() < low + 0.01 * width
    assert values.max() > high - 0.01 * width
    assert abs(values.mean(dtype=np.float64) - (low + high) / 2) < 5 * width / sqrt(12 * count)
    assert abs(values.var(dtype=np.float64) - width**2 / 12) < 5 * width**2 * sqrt(1 / 180 / count)


def _check_normal(values: Array, mean: float, std: float) -> None:
    """Mean and variance of N(mean, std^2) within 5 standard errors, and its share within one deviation."""
    count = values.size
    assert abs(values.mean(dtype=np.float64) - mean) < 5 * std / sqrt(count)
    assert abs(values.var(dtype=np.float64) - std**2) < 5 * std**2 * sqrt(2 / count)
    assert abs((np.abs(values - mean) < std).mean() - 0.6826895) < 5 * sqrt(0.22 / count)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 4, 5)])
def test_constant(shape: tuple[int, ...]) -> None:
    np.testing.assert_array_equal(_fill("", shape), np.zeros(shape))
    np.testing.assert_array_equal(_fill('type: "constant" value: 0.1', shape), np.full(shape, np.float32(0.1)))


def test_uniform() -> None:
    _check_uniform(_fill('type: "uniform"', (40_000,)), 0, 1)
    _check_uniform(_fill('type: "uniform" min: -0.3 max: 0.1', (20, 30, 50)), -0.3, 0.1)
    assert _fill('type: "uniform" min: 2 max: 2', (3,)).tolist() == [2, 2, 2]


def test_gaussian() -> None:
    _check_normal(_fill('type: "gaussian"', (40_000,)), 0, 1)
    _check_normal(_fill('type: "gaussian" mean: 3 std: 0.05', (20, 30, 50)), 3, 0.05)


def test_gaussian_sparse_keeps_each_value_with_probability_sparse_over_outputs() -> None:
    values = _fill('type: "gaussian" std: 2 mean: 9 sparse: 15', (50, 800))
    kept = values != 0
    assert abs(kept.mean() - 0.3) < 5 * sqrt(0.3 * 0.7 / values.size)
    _check_normal(values[kept], 9, 2)
    # The mask is drawn after the values: those kept are the dense filler's own.
    np.testing.assert_array_equal(values[kept], _fill('type: "gaussian" std: 2 mean: 9', (50, 800))[kept])
    assert not _fill('type: "gaussian" sparse: 0', (50, 80)).any()
    assert _fill('type: "gaussian" sparse: 50', (50, 80)).all()


def test_positive_unitball() -> None:
    values = _fill('type: "positive_unitball"', (7, 10, 20))
    assert values.min() >= 0
    np.testing.assert_allclose(values.sum(axis=(1, 2), dtype=np.float64), 1, rtol=1e-6)
    _check_uniform(values[0] * 100, 0, float(values[0].max()) * 100)


# (shape, variance_norm, n): a convolution (outputs, inputs, rows, columns), an inner product (outputs, inputs), a bias.
FANS = [
    ((64, 32, 3, 5), "FAN_IN", 32 * 3 * 5),
    ((64, 32, 3, 5), "FAN_OUT", 64 * 3 * 5),
    ((64, 32, 3, 5), "AVERAGE", (32 + 64) * 15 / 2),
    ((100, 400), "FAN_IN", 400),
    ((100, 400), "FAN_OUT", 100),
    ((100, 400), "AVERAGE", 250),
    ((30_000,), "FAN_IN", 1),
    ((30_000,), "FAN_OUT", 30_000),
]


@pytest.mark.parametrize(("shape", "norm", "n"), FANS)
def test_xavier(shape: tuple[int, ...], norm: str, n: float) -> None:
    _check_uniform(_fill(f'type: "xavier" variance_norm: {norm}', shape), -sqrt(3 / n), sqrt(3 / n))


@pytest.mark.parametrize(("shape", "norm", "n"), FANS)
def test_msra(shape: tuple[int, ...], norm: str, n: float) -> None:
    _check_normal(_fill(f'type: "msra" variance_norm: {norm}', shape), 0, sqrt(2 / n))


def test_bilinear() -> None:
    # Kernel 4 (factor 2): the weights 1/4, 3/4, 3/4, 1/4 of doubling by linear interpolation, along both axes.
    line = np.array([0.25, 0.75, 0.75, 0.25])
    np.testing.assert_array_equal(_fill('type: "bilinear"', (2, 3, 4, 4)), np.broadcast_to(np.outer(line, line), (2, 3, 4, 4)))
    # Kernel 3: f = 2, c = 1/2.
    line = np.array([0.5, 1, 0.5])
    np.testing.assert_array_equal(_fill('type: "bilinear"', (1, 1, 3, 3))[0, 0], np.outer(line, line))


@pytest.mark.parametrize("kind", ["uniform", "gaussian", "positive_unitball", "xavier", "msra"])
def test_the_generator_decides_everything(kind: str) -> None:
    first, again, other = (_fill(f'type: "{kind}"', (5, 6), seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("text", "shape", "message"),
    [
        ('type: "guassian"', (3,), "unknown filler type 'guassian': did you mean 'gaussian'?"),
        ('type: "zzz"', (3,), "known ones: bilinear, constant, gaussian"),
        ("", (3, 0), "cannot fill a blob of shape (3, 0): it has no elements"),
        ('type: "xavier" sparse: 3', (3,), "sparse belongs to gaussian fillers only, found it on 'xavier'"),
        ('type: "constant" sparse: 0', (3,), "sparse belongs to gaussian fillers only"),
        ('type: "uniform" min: 2', (3,), "needs min <= max, found min 2 and max 1"),
        ('type: "gaussian" std: 0', (3,), "needs std > 0, found 0"),
        ('type: "gaussian" std: nan', (3,), "needs std > 0, found nan"),
        ('type: "gaussian" sparse: -2', (3,), "sparse must be at least 0"),
        ('type: "gaussian" sparse: 4', (3, 9), "sparse 4 is more than the 3 outputs"),
        ('type: "gaussian" sparse: 1', (), "at least one axis"),
        ('type: "positive_unitball"', (), "at least one axis"),
        ('type: "xavier"', (), "a filler of type xavier needs a blob with at least one axis"),
        ('type: "msra"', (), "a filler of type msra needs a blob with at least one axis"),
        ('type: "bilinear"', (1, 1, 3, 4), "square kernel, found shape (1, 1, 3, 4)"),
        ('type: "bilinear"', (3, 3), "4 axes"),
    ],
)
def test_refusals(text: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        _fill(text, shape)
    assert message in caught.value.message
    filler = pb.FillerParameter()
    parse_text(text, filler)
    with pytest.raises(SpecError) as checked:
        check_filler(filler, shape, SpecError)
    assert checked.value.message == caught.value.message
