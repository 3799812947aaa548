"""Pooling: extents, every refusal, and values and gradients against loops over windows."""

from __future__ import annotations

import numpy as np
import pytest
from layer_harness import Rig, all_different, check_gradient, close, make_layer, refusal, shapes_of

from caffelite.backends.contract import Backend

FLT_MAX = float(np.finfo(np.float32).max)


def text(fields: str) -> str:
    return f'type: "Pooling"\npooling_param {{ {fields} }}'


@pytest.mark.parametrize(
    ("fields", "plane", "pooled"),
    [
        ("kernel_size: 3 stride: 2", (55, 55), (27, 27)),
        ("kernel_size: 3 stride: 2", (32, 48), (16, 24)),  # CEIL: (32-3)/2 = 14.5 -> 15
        ("kernel_size: 3 stride: 2 round_mode: FLOOR", (32, 48), (15, 23)),
        ("kernel_size: 3 stride: 2 pad: 1", (4, 4), (3, 3)),
        ("kernel_size: 2 stride: 2 pad: 1", (3, 3), (2, 2)),  # the third window starts at 3 = in: clipped (1 + 1)
        ("kernel_size: 3 stride: 3 pad: 1", (5, 6), (2, 3)),
        ("kernel_size: 1 stride: 2", (4, 4), (3, 3)),  # not clipped without padding
        ("kernel_h: 1 kernel_w: 3 stride_h: 1 stride_w: 2", (5, 7), (5, 3)),
        ("kernel_size: 2 pad_h: 1 pad_w: 0", (3, 3), (4, 2)),
        ("kernel_size: 3 stride: 2", (2, 2), (1, 1)),  # larger than the plane, yet rounded up to one window
        ("global_pooling: true", (6, 5), (1, 1)),
        ("global_pooling: true pool: AVE engine: CUDNN", (1, 1), (1, 1)),
    ],
)
def test_pooled_extents(fields: str, plane: tuple[int, int], pooled: tuple[int, int]) -> None:
    assert shapes_of(text(fields), (2, 3, *plane)) == [(2, 3, *pooled)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("@stride: 2", "the kernel's size is missing"),
        ("kernel_size: 3 @kernel_h: 3 kernel_w: 3", "both kernel_size and kernel_h are given"),
        ("@kernel_h: 3", "kernel_h is given alone"),
        ("@kernel_w: 3", "kernel_w is given alone"),
        ("@kernel_size: 0", "kernel_size is (0, 0)"),
        ("@kernel_h: 0 kernel_w: 2", "kernel_size is (0, 2)"),
        ("kernel_size: 3 @stride: 0", "stride is (0, 0)"),
        ("kernel_size: 3 @stride_h: 2", "stride_h is given alone"),
        ("kernel_size: 3 stride: 2 @stride_h: 2 stride_w: 2", "both stride and stride_h"),
        ("kernel_size: 3 @pad_w: 1", "pad_w is given alone"),
        ("kernel_size: 3 pad: 1 @pad_h: 1 pad_w: 1", "both pad and pad_h"),
        ("kernel_size: 2 @pad: 2", "pad (2, 2) is not smaller than the kernel (2, 2)"),
        ("kernel_h: 3 kernel_w: 1 @pad_h: 1 pad_w: 1", "pad (1, 1) is not smaller than the kernel (3, 1)"),
        ("global_pooling: true @kernel_size: 3", "kernel_size is given with global_pooling"),
        ("global_pooling: true @kernel_h: 3", "kernel_h is given with global_pooling"),
        ("global_pooling: true @pad: 1", "pad is (1, 1) with global_pooling"),
        ("global_pooling: true @stride: 2", "stride is (2, 2) with global_pooling"),
        ("kernel_size: 3 @pool: STOCHASTIC", "STOCHASTIC pooling is not available"),
        ("@kernel_size: 9", "the window (9, 9) does not fit into a plane of (4, 5)"),
    ],
)
def test_refusals(fields: str, message: str) -> None:
    marked = fields.replace("@", "") if "missing" in message else fields
    assert message in refusal(text(marked))


def test_refusals_of_blobs() -> None:
    assert "needs a bottom with 4 axes (N,C,H,W), found shape (2, 3, 4)" in str(_shape_error((2, 3, 4)))
    assert "only MAX pooling has a second top" in refusal(text("kernel_size: 2 pool: AVE"), tops=2)


def _shape_error(shape: tuple[int, ...]) -> Exception:
    with pytest.raises(Exception, match="4 axes") as caught:
        make_layer(text("kernel_size: 2")).infer_shapes([shape])
    return caught.value


def windows(size: int, kernel: int, stride: int, pad: int, pooled: int) -> list[tuple[int, int]]:
    return [(p * stride - pad, p * stride - pad + kernel) for p in range(pooled)]


CASES = [
    ("kernel_size: 3 stride: 2", (5, 6), 3, 2, 0, (2, 3)),
    ("kernel_size: 3 stride: 2 pad: 1", (4, 4), 3, 2, 1, (3, 3)),
    ("kernel_size: 2 stride: 3 round_mode: FLOOR", (7, 6), 2, 3, 0, (2, 2)),
    ("kernel_size: 1 stride: 2", (4, 4), 1, 2, 0, (3, 3)),
    ("global_pooling: true", (4, 4), 4, 1, 0, (1, 1)),
]


@pytest.mark.parametrize(("fields", "plane", "kernel", "stride", "pad", "pooled"), CASES)
def test_max(
    backend: Backend, rng: np.random.Generator, fields: str, plane: tuple[int, int], kernel: int, stride: int, pad: int, pooled: tuple[int, int]
) -> None:
    x, dy = all_different(rng, 2, 3, *plane), rng.standard_normal((2, 3, *pooled))
    want, index, dx = np.full(dy.shape, -FLT_MAX), np.full(dy.shape, -1.0), np.zeros(x.shape)
    for n, c, i, j in np.ndindex(dy.shape):
        top, left = i * stride - pad, j * stride - pad
        for h in range(max(top, 0), min(top + kernel, plane[0])):
            for w in range(max(left, 0), min(left + kernel, plane[1])):
                if x[n, c, h, w] > want[n, c, i, j]:
                    want[n, c, i, j], index[n, c, i, j] = x[n, c, h, w], h * plane[1] + w
        if index[n, c, i, j] >= 0:
            dx[n, c, int(index[n, c, i, j]) // plane[1], int(index[n, c, i, j]) % plane[1]] += dy[n, c, i, j]
    rig = Rig(backend, text(fields), [x], tops=2)
    y, indices = rig.forward()
    np.testing.assert_allclose(y, want, rtol=1e-6)
    np.testing.assert_array_equal(indices, index)
    assert rig.tops[1].dtype == "float32"
    close(rig.backward(dy)[0], dx)


@pytest.mark.parametrize(("fields", "plane", "kernel", "stride", "pad", "pooled"), CASES)
def test_ave(
    backend: Backend, rng: np.random.Generator, fields: str, plane: tuple[int, int], kernel: int, stride: int, pad: int, pooled: tuple[int, int]
) -> None:
    x, dy = rng.standard_normal((2, 3, *plane)), rng.standard_normal((2, 3, *pooled))
    want, dx = np.full(dy.shape, np.nan), np.zeros(x.shape)
    for i, (top, bottom) in enumerate(windows(plane[0], kernel, stride, pad, pooled[0])):
        for j, (left, right) in enumerate(windows(plane[1], kernel, stride, pad, pooled[1])):
            area = (min(bottom, plane[0] + pad) - top) * (min(right, plane[1] + pad) - left)
            part = (slice(None), slice(None), slice(max(top, 0), bottom), slice(max(left, 0), right))
            if x[part].size:
                want[:, :, i, j] = x[part].sum(axis=(2, 3)) / area
                dx[part] += dy[:, :, i, j][:, :, None, None] / area
    rig = Rig(backend, text(f"pool: AVE {fields}"), [x])
    close(rig.forward()[0], want)
    if not np.isnan(want).any():
        close(rig.backward(dy)[0], dx)


def test_a_padded_average_counts_zeros_up_to_the_padded_edge(backend: Backend) -> None:
    rig = Rig(backend, text("pool: AVE kernel_size: 3 stride: 2 pad: 1"), [np.full((1, 1, 4, 4), 2.0)])
    close(rig.forward()[0][0, 0], np.array([[8 / 9, 4 / 3, 2 / 3], [4 / 3, 2, 1], [2 / 3, 1, 0.5]]))  # as Caffe printed it


@pytest.mark.parametrize("fields", ["kernel_size: 3 stride: 2", "pool: AVE kernel_size: 3 stride: 2 pad: 1", "pool: AVE global_pooling: true"])
def test_gradients(rng: np.random.Generator, fields: str) -> None:
    check_gradient(text(fields), [all_different(rng, 2, 2, 4, 5)])


def test_nothing_is_read_back_and_no_gradient_is_made_unasked(backend: Backend, rng: np.random.Generator) -> None:
    rig = Rig(backend, text("kernel_size: 2"), [all_different(rng, 2, 2, 4, 5)])
    rig.forward()
    assert rig.layer.backward_reads() == frozenset()
    assert np.isnan(rig.backward(np.ones((2, 2, 3, 4)), down=[False])[0]).all()
