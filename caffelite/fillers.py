"""Caffe's parameter fillers: the values that weights and biases start with."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, prod, sqrt

import numpy as np
import numpy.typing as npt

from caffelite.blob import Shape
from caffelite.errors import SpecError, did_you_mean
from caffelite.schema import pb

Values = npt.NDArray[np.float32]
Fail = Callable[[str], SpecError]


def check_filler(filler: pb.FillerParameter, shape: Shape, fail: Fail) -> None:
    """Raises what `fill` would, without drawing anything; `fail` makes the error.

    Refused: an unknown type, an empty blob, `sparse` on anything but gaussian, parameters or shapes that the filler cannot use.
    """
    if filler.type not in _MAKE:
        raise fail(f"unknown filler type '{filler.type}': {did_you_mean(filler.type, sorted(_MAKE))}")
    if prod(shape) == 0:
        raise fail(f"a filler of type {filler.type} cannot fill a blob of shape {tuple(shape)}: it has no elements")
    if filler.sparse != -1 and filler.type != "gaussian":
        raise fail(f"sparse belongs to gaussian fillers only, found it on '{filler.type}'")
    if not shape and (filler.type in _NEED_AN_AXIS or filler.sparse >= 0):
        raise fail(f"a filler of type {filler.type} needs a blob with at least one axis")
    if filler.type in _CHECK:
        _CHECK[filler.type](filler, tuple(shape), fail)


def fill(filler: pb.FillerParameter, shape: Shape, rng: np.random.Generator, fail: Fail) -> Values:
    """Starting values of a blob: float32, C order, `shape`. `rng` gives all randomness.

    Formulas stand with each filler. Errors: see check_filler.
    """
    check_filler(filler, shape, fail)
    return _MAKE[filler.type](filler, tuple(shape), rng)


def _check_uniform(filler: pb.FillerParameter, shape: Shape, fail: Fail) -> None:
    if not filler.min <= filler.max:
        raise fail(f"a uniform filler needs min <= max, found min {filler.min:g} and max {filler.max:g}")


def _check_gaussian(filler: pb.FillerParameter, shape: Shape, fail: Fail) -> None:
    if not filler.std > 0:
        raise fail(f"a gaussian filler needs std > 0, found {filler.std:g}")
    if filler.sparse < -1:
        raise fail(f"sparse must be at least 0 (or -1 for none), found {filler.sparse}")
    if shape and filler.sparse > shape[0]:
        raise fail(f"sparse {filler.sparse} is more than the {shape[0]} outputs of a blob of shape {shape}")


def _check_bilinear(filler: pb.FillerParameter, shape: Shape, fail: Fail) -> None:
    if len(shape) != 4 or shape[2] != shape[3]:
        raise fail(f"a bilinear filler needs a blob of 4 axes with a square kernel, found shape {shape}")


def _constant(filler: pb.FillerParameter, shape: Shape, rng: np.random.Generator) -> Values:
    return np.full(shape, filler.value, np.float32)


def _uniform(filler: pb.FillerParameter, shape: Shape, rng: np.random.Generator) -> Values:
    """U[min, max]."""
    return _between(filler.min, filler.max, shape, rng)


def _gaussian(filler: pb.FillerParameter, shape: Shape, rng: np.random.Generator) -> Values:
    """N(mean, std^2); with sparse s >= 0 each value is kept with probability s / shape[0], the mask drawn after the values."""
    values = _normal(filler.mean, filler.std, shape, rng)
    if filler.sparse >= 0:
        values *= rng.random(shape, np.float32) < filler.sparse / shape[0]
    return values


def _positive_unitball(filler: pb.FillerParameter, shape: Shape, rng: np.random.Generator) -> Values:
    """U[0,1], then every slice along axis 0 divided by its sum: its values add up to 1."""
    rows = rng.random((shape[0], prod(shape[1:])), np.float32)
    rows /= rows.sum(axis=1, keepdims=True, dtype=np.float64)
    return rows.reshape(shape)


def _xavier(filler: pb.FillerParameter, shape: Shape, rng: np.random.Generator) -> Values:
    """U[-a, a], a = sqrt(3 / n) (Glorot and Bengio 2010); n by variance_norm."""
    bound = sqrt(3.0 / _fan(filler, shape))
    return _between(-bound, bound, shape, rng)


def _msra(filler: pb.FillerParameter, shape: Shape, rng: np.random.Generator) -> Values:
    """N(0, 2 / n) (He et al. 2015); n by variance_norm."""
    return _normal(0.0, sqrt(2.0 / _fan(filler, shape)), shape, rng)


def _bilinear(filler: pb.FillerParameter, shape: Shape, rng: np.random.Generator) -> Values:
    """w[y,x] = (1 - |x/f - c|) (1 - |y/f - c|) in every plane, f = ceil(K/2), c = (K-1) / (2f), K the kernel size."""
    factor = ceil(shape[3] / 2)
    centre = (shape[3] - 1) / (2.0 * factor)
    ramp = 1 - np.abs(np.arange(shape[3]) / factor - centre)
    return np.broadcast_to(np.outer(ramp, ramp), shape).astype(np.float32, order="C")


def _fan(filler: pb.FillerParameter, shape: Shape) -> float:
    """fan_in = count / shape[0], fan_out = count / shape[1] (count itself with one axis), or their mean."""
    count = prod(shape)
    fan_in = count // shape[0]
    fan_out = count // shape[1] if len(shape) > 1 else count
    if filler.variance_norm == pb.FillerParameter.AVERAGE:
        return (fan_in + fan_out) / 2
    return fan_out if filler.variance_norm == pb.FillerParameter.FAN_OUT else fan_in


def _between(low: float, high: float, shape: Shape, rng: np.random.Generator) -> Values:
    values = rng.random(shape, np.float32)
    values *= np.float32(high - low)
    values += np.float32(low)
    return np.clip(values, np.float32(low), np.float32(high), out=values)  # rounding may step over a bound


def _normal(mean: float, std: float, shape: Shape, rng: np.random.Generator) -> Values:
    values = rng.standard_normal(shape, np.float32)
    values *= np.float32(std)
    values += np.float32(mean)
    return values


_MAKE: dict[str, Callable[[pb.FillerParameter, Shape, np.random.Generator], Values]] = {
    "constant": _constant,
    "uniform": _uniform,
    "gaussian": _gaussian,
    "positive_unitball": _positive_unitball,
    "xavier": _xavier,
    "msra": _msra,
    "bilinear": _bilinear,
}
_CHECK: dict[str, Callable[[pb.FillerParameter, Shape, Fail], None]] = {"uniform": _check_uniform, "gaussian": _check_gaussian, "bilinear": _check_bilinear}
_NEED_AN_AXIS = ("positive_unitball", "xavier", "msra")
