"""Convolution by Winograd's filters on oneDNN: the matrices, all three passes against float64, how much they round, and when they are chosen."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from arrays import Maker
from onednn_harness import computes, random

from caffelite import environment
from caffelite.backends.onednn import convolution, convolution_weights, winograd
from caffelite.backends.onednn import convolution_winograd as filters
from caffelite.backends.onednn.convolution_geometry import Geometry
from caffelite.backends.onednn.dnnl import BF16, F32, Scratch
from caffelite.backends.onednn.memory import AMX
from caffelite.errors import SpecError

TYPES = {"float32": F32, "bfloat16": BF16}


class Case(NamedTuple):
    images: int
    channels: int
    size: tuple[int, int]
    outputs: int
    kernel: tuple[int, int]
    pad: tuple[int, int]
    group: int

    @property
    def out(self) -> tuple[int, int]:
        height, width = (s + 2 * p - k + 1 for s, p, k in zip(self.size, self.pad, self.kernel))
        return height, width

    @property
    def numbers(self) -> dict[str, Any]:
        return {"stride": (1, 1), "pad": self.pad, "dilation": (1, 1), "group": self.group}


CASES = {
    "3x3": Case(3, 5, (7, 11), 7, (3, 3), (1, 1), 1),
    "5x5": Case(2, 3, (13, 9), 5, (5, 5), (2, 2), 1),
    "3x5, less padding": Case(2, 4, (9, 8), 6, (3, 5), (0, 1), 1),
    "5x3, more padding": Case(2, 3, (6, 7), 4, (5, 3), (4, 2), 1),
    "groups": Case(2, 6, (12, 13), 9, (3, 3), (1, 1), 3),
    "5x5 in groups": Case(5, 4, (14, 11), 6, (5, 5), (2, 2), 2),
    "one row of outputs": Case(2, 3, (3, 17), 4, (3, 3), (0, 1), 1),
    "many tiles": Case(1, 2, (67, 61), 3, (3, 3), (1, 1), 1),
}


def skip_without(onednn: Any, dtype: str) -> None:
    """There is nothing to plan where oneDNN has no primitives."""
    if not computes(onednn, dtype):
        pytest.skip(f"oneDNN has no primitives in {dtype} here")


# --- the filters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "kernel"), [(n, kernel) for n in winograd.POINTS for kernel in (3, 5) if n > kernel])
def test_a_filter_and_its_gradient_equal_plain_sums(n: int, kernel: int) -> None:
    """In float64; the error grows with n as it does in float32."""
    tile = n + 1 - kernel
    f, rng = winograd.filter_of(tile, kernel), np.random.default_rng(n)
    d, g, dy = rng.standard_normal(n), rng.standard_normal(kernel), rng.standard_normal(tile)
    assert np.allclose(f.a @ ((f.g @ g) * (f.b @ d)), np.correlate(d, g), rtol=0, atol=1e-10)
    assert np.allclose(f.g.T @ ((f.a.T @ dy) * (f.b @ d)), np.correlate(d, dy), rtol=0, atol=1e-10)


def test_the_tile_with_the_fewest_products_is_taken() -> None:
    assert winograd.best_tile(24, 5, 8) == 4  # 6 tiles of 8 terms; one more output a tile would need 9 terms
    assert winograd.best_tile(24, 5, 10) == 6  # 4 tiles of 10
    assert winograd.best_tile(13, 3, 8) == 5  # 3 tiles of 7 rather than 4 of 6 or 3 of 8
    assert winograd.best_tile(4, 3, 8) == 4
    assert winograd.best_tile(1, 3, 8) == 2


# --- the passes ------------------------------------------------------------------------------------------------------------


def exact(case: Case, x: Any, w: Any, b: Any, dy: Any, reference: Any) -> dict[str, np.ndarray]:
    """All results of one convolution, in float64."""
    wide = {}
    for name, z in {"x": x, "w": w, "dy": dy}.items():
        wide[name] = reference.empty(z.shape, "float64")
        wide[name][...] = z
    made = {name: reference.empty(z.shape, "float64") for name, z in {"y": dy, "dx": x, "dw": w}.items()}
    reference.convolution_forward(wide["x"], wide["w"], b.astype(np.float64), made["y"], relu=True, **case.numbers)
    reference.convolution_backward_data(wide["dy"], wide["w"], made["dx"], **case.numbers)
    reference.convolution_backward_weights(wide["x"], wide["dy"], made["dw"], None, accumulate_w=False, accumulate_b=False, **case.numbers)
    return {**made, "db": wide["dy"].sum((0, 2, 3))}


def filtered(onednn: Any, case: Case, x: Any, w: Any, b: Any, dy: Any, make: Any, more: float = 0.0) -> dict[str, Any]:
    """The same by filters, whether they pay or not. more: what gradients of parameters hold before, if anything."""
    dtype, add = str(x.dtype), more != 0
    y, dx, dw, db = make.empty(dy.shape, dtype), make.empty(x.shape, dtype), make(np.full(w.shape, more)), make(np.full(b.shape, more))
    s = filters.shape_of(x, w, dy, *case.numbers.values())
    filters.plan_forward(onednn.dnnl, s, x, w, b, True)(*at(x, w, b, y))
    filters.plan_backward_data(onednn.dnnl, s, dy, w)(*at(dy, w, dx))
    filters.plan_backward_weights(onednn.dnnl, s, x, True, add, add)(*at(x, dy, dw, db))
    return {"y": y, "dx": dx, "dw": dw, "db": db}


def at(*arrays: Any) -> list[int]:
    return [z.ctypes.data for z in arrays]


def error(got: Any, want: np.ndarray) -> float:
    """Root of the mean square of the differences, by that of the values."""
    return float(np.sqrt(np.square(got.astype(np.float64) - want).mean() / np.square(want).mean()))


def operands(case: Case, dtype: str) -> tuple[Any, ...]:
    x, dy = random((case.images, case.channels, *case.size), dtype), random((case.images, case.outputs, *case.out), dtype, 1)
    return x, random((case.outputs, case.channels // case.group, *case.kernel), dtype, 2, 0.2), random((case.outputs,), seed=3), dy


@pytest.mark.parametrize("piece", ["whole", "piece by piece"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_each_pass_agrees_with_float64(onednn: Any, reference: Any, monkeypatch: pytest.MonkeyPatch, case: Case, dtype: str, piece: str) -> None:
    """Filters along both axes, too, are for kernels of 3 and 5; that 3 never pays with them is another matter."""
    skip_without(onednn, dtype)
    monkeypatch.setattr(filters, "KERNELS", {F32: (3, 5), BF16: (3, 5)})
    if piece != "whole":
        monkeypatch.setattr(filters, "pieces", lambda images, most: [1] * images if images < 3 else [2] * (images // 2) + [1] * (images % 2))
    x, w, b, dy = operands(case, dtype)
    make = Maker(onednn)
    want, got = exact(case, x, w, b, dy, reference), filtered(onednn, case, x, w, b, dy, make)
    more = filtered(onednn, case, x, w, b, dy, make, more=1.0)
    make.check()
    limits = {"y": 3e-6, "dx": 3e-6, "dw": 3e-6, "db": 1e-6} if dtype == "float32" else {"y": 3e-3, "dx": 3e-3, "dw": 1e-4, "db": 1e-6}
    assert {name: error(got[name], want[name]) for name in want if error(got[name], want[name]) > limits[name]} == {}
    assert all(error(more[name], want[name] + 1) < limits[name] for name in ("dw", "db"))


def test_parameters_may_have_types_and_strides_of_their_own(onednn: Any, reference: Any) -> None:
    """Weights in float32 and bias in bfloat16, with gaps, beside blobs of bfloat16."""
    skip_without(onednn, "bfloat16")
    case = CASES["5x5"]
    x, w, _, dy = operands(case, "bfloat16")
    w, b = random(w.shape, seed=2, scale=0.2), random((3 * case.outputs,), "bfloat16", 3)[::3]
    want, got = exact(case, x, w, b, dy, reference), filtered(onednn, case, x, w, b, dy, Maker(onednn))
    assert all(error(got[name], want[name]) < 3e-3 for name in ("y", "dx"))


def test_scratch_memory_that_grows_between_runs_changes_nothing(onednn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans share it: what a small net's plan wrote to before must not be where it writes after a larger net's has run."""
    monkeypatch.setattr(onednn.dnnl, "scratch", Scratch())
    small, large = CASES["groups"], CASES["groups"]._replace(images=40, size=(50, 40))
    x, w, b, dy = operands(small, "float32")
    s, y = filters.shape_of(x, w, dy, *small.numbers.values()), np.empty_like(dy)
    plan = filters.plan_forward(onednn.dnnl, s, x, w, b, True)
    plan(*at(x, w, b, y))
    held, first = onednn.dnnl.scratch.nbytes, y.copy()
    filtered(onednn, large, *operands(large, "float32"), Maker(onednn))
    assert onednn.dnnl.scratch.nbytes > held
    plan(*at(x, w, b, y))
    assert np.array_equal(y, first)


def test_a_nan_comes_through_with_relu(onednn: Any) -> None:
    case = CASES["3x3"]
    x, w, b, dy = operands(case, "float32")
    x[1, 2, 3, 4] = np.nan
    y = filtered(onednn, case, x, w, b, dy, Maker(onednn))["y"]
    assert np.isnan(y[1, :, 2:5, 3:6]).all()
    assert np.isfinite(y[[0, 2]]).all()


def plain(onednn: Any, case: Case, x: Any, w: Any, b: Any, dy: Any) -> dict[str, Any]:
    """The same by oneDNN's convolutions."""
    g = Geometry(onednn.dnnl, x, w, dy, *case.numbers.values())
    y, dx, dw = np.empty_like(dy), np.empty_like(x), random(w.shape)
    convolution.plan_forward(g, x, w, b, y, True)(*at(x, w, b, y))
    convolution.plan_backward_data(g, dy, w, dx)(*at(dy, w, dx))
    convolution_weights.plan_backward_weights(g, x, dy, dw, None, False, False, onednn.threads)(*at(x, dy, dw), 0)
    return {"y": y, "dx": dx, "dw": dw}


NIN_CONV2, ALEXNET_CONV4 = Case(2, 96, (24, 24), 192, (5, 5), (2, 2), 1), Case(2, 384, (13, 13), 384, (3, 3), (1, 1), 2)


def errors(onednn: Any, reference: Any, case: Case, dtype: str, mean: float = 0.0) -> dict[str, tuple[float, float]]:
    """Of filters, and of plain sums. mean: of x."""
    x, w, b, dy = operands(case, dtype)
    x += x.dtype.type(mean)
    want, sums, got = exact(case, x, w, b, dy, reference), plain(onednn, case, x, w, b, dy), filtered(onednn, case, x, w, b, dy, Maker(onednn))
    return {name: (error(got[name], want[name]), error(sums[name], want[name])) for name in sums}


ROUNDING = {"y": 5, "dx": 5, "dw": 7}  # times the error of plain sums, for normal values in float32; docs/design.md promises as much


@pytest.mark.parametrize("case", [NIN_CONV2, ALEXNET_CONV4], ids=["5x5", "3x3"])
def test_float32_rounds_little_more_than_plain_sums(onednn: Any, reference: Any, case: Case) -> None:
    found = errors(onednn, reference, case, "float32")
    assert {name: (own, plain) for name, (own, plain) in found.items() if own >= ROUNDING[name] * plain} == {}


def rows_for(tile: int, kernel: int) -> int:
    """The fewest rows of outputs for which this tile is chosen in float32; 0: none."""
    return next((rows for rows in range(1, 60) if winograd.best_tile(rows, kernel, filters.MOST_TERMS[F32]) == tile), 0)


@pytest.mark.parametrize("mean", [0, 100])
@pytest.mark.parametrize(("kernel", "tile"), [(k, t) for k in (3, 5) for t in range(1, 9) if rows_for(t, k)])
def test_every_tile_of_float32_rounds_so(onednn: Any, reference: Any, kernel: int, tile: int, mean: int) -> None:
    """Few rows and images: there plain sums are at their best, and filters no better than elsewhere."""
    found = errors(onednn, reference, Case(2, 64, (rows_for(tile, kernel), 16), 64, (kernel,) * 2, (kernel // 2,) * 2, 1), "float32", mean)
    assert {name: (own, plain) for name, (own, plain) in found.items() if own >= ROUNDING[name] * plain} == {}


def test_bfloat16_rounds_a_fiftieth_of_what_its_operands_did(onednn: Any, reference: Any) -> None:
    """Blobs in bfloat16 differ by 1.7e-3 from what they stand for. So do results, which leave so rounded; the gradients of weights are float32."""
    skip_without(onednn, "bfloat16")
    found = errors(onednn, reference, NIN_CONV2, "bfloat16")
    assert all(found[name][0] < 1.001 * found[name][1] for name in ("y", "dx"))
    assert 1.6e-3 < found["y"][1] < 1.7e-3
    assert found["dw"][0] < 3e-5


# --- when they are chosen -----------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(onednn: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Which of the three ops of a convolution ask for filters."""

    def ask(case: Case, dtype: str) -> list[str]:
        x, w, b, dy = operands(case, dtype)
        dw, names = random(w.shape), []
        for name in ("plan_forward", "plan_backward_data", "plan_backward_weights"):
            made = getattr(filters, name)

            def plan(*arguments: Any, made: Any = made, name: str = name) -> Any:
                names.append(name)
                return made(*arguments)

            monkeypatch.setattr(filters, name, plan)
        onednn._plans.clear()
        onednn.convolution_forward(x, w, b, np.empty_like(dy), **case.numbers)
        onednn.convolution_backward_data(dy, w, np.empty_like(x), **case.numbers)
        onednn.convolution_backward_weights(x, dy, dw, b, accumulate_w=False, accumulate_b=False, **case.numbers)
        onednn._plans.clear()
        return names

    return ask


ALL = ["plan_forward", "plan_backward_data", "plan_backward_weights"]
BATCH_OF_16 = NIN_CONV2._replace(images=16)


def test_large_convolutions_run_so(asked: Any, onednn: Any) -> None:
    assert asked(NIN_CONV2, "float32") == ALL
    assert asked(ALEXNET_CONV4._replace(images=32), "float32") == ALL
    assert asked(BATCH_OF_16, "bfloat16") == ([] if onednn.dnnl.instruction_set() & AMX == AMX else ALL)


@pytest.mark.parametrize("change", [{"channels": 8, "outputs": 8}, {"kernel": (1, 1), "pad": (0, 0)}, {"kernel": (7, 7), "pad": (3, 3)}], ids=str)
def test_others_do_not(asked: Any, change: dict[str, Any]) -> None:
    assert asked(NIN_CONV2._replace(**change), "float32") == []


def test_products_of_amx_are_not_outrun(asked: Any, onednn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn.dnnl, "instruction_set", lambda: AMX)
    assert asked(BATCH_OF_16, "bfloat16") == []
    assert asked(NIN_CONV2, "float32") == ALL


def test_the_environment_can_forbid_them(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.WINOGRAD, "0")
    assert asked(NIN_CONV2, "float32") == []
    monkeypatch.setenv(environment.WINOGRAD, "no")
    with pytest.raises(SpecError, match="CAFFELITE_WINOGRAD is 'no'"):
        asked(NIN_CONV2, "float32")
