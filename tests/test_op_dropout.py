"""Dropout: the mask is exactly the contract's, on every backend: stem dropout."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import DTYPES, assert_close, dropout_key, rectified

KEYS = [(1, 2, 3), (2**64 - 1, 2**32 - 1, 2**40)]
Key = tuple[int, int, int]  # as DropoutKey has them


def philox_words(count: int, key: Key) -> list[int]:
    """Philox 4x64-10 in plain integers, by the constants of Salmon et al. 2011; block b uses counter b+1 in its lowest word."""
    low = (1 << 64) - 1
    words: list[int] = []
    while len(words) < count:
        c, k = [len(words) // 4 + 1, 0, key[2], 0], [key[0], key[1]]
        for _ in range(10):
            a, b = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
            c = [(b >> 64) ^ c[1] ^ k[0], b & low, (a >> 64) ^ c[3] ^ k[1], a & low]
            k = [(k[0] + 0x9E3779B97F4A7C15) & low, (k[1] + 0xBB67AE8584CAA73B) & low]
        words += c
    return words[:count]


def wanted_mask(shape: tuple[int, ...], ratio: float, key: Key) -> np.ndarray:
    """In logical order; the draws go along memory, channels last."""
    count = int(np.prod(shape))
    values = [(word >> shift) & 0xFFFF for word in philox_words(-(-count // 4), key) for shift in (0, 16, 32, 48)][:count]
    drawn = np.array([value >= round(ratio * 65536) for value in values])
    if len(shape) == 4:
        n, c, h, w = shape
        return drawn.reshape(n, h, w, c).transpose(0, 3, 1, 2)
    return drawn.reshape(shape)


@pytest.mark.parametrize("layout", ["contract", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key", KEYS, ids=["small key", "large key"])
@pytest.mark.parametrize("shape", [(2, 5, 3, 7), (3, 11), (2, 3, 5), (1,)], ids=str)
def test_mask_and_values(backend, make, rng, shape, key: Key, dtype: str, layout: str) -> None:
    for ratio in (0.5, 0.3):
        x, dy = (make(rng.standard_normal(shape), dtype, layout) for _ in range(2))
        y, dx, mask = make.empty(shape, dtype, layout), make.empty(shape, dtype, layout), make.empty(shape, "uint8", layout)
        backend.dropout_forward(x, y, mask, ratio=ratio, key=dropout_key(backend, *key))
        want = wanted_mask(shape, ratio, key)
        np.testing.assert_array_equal(make.host(mask), want)
        assert_close(make.host(y), make.host(x) * want / (1 - ratio), dtype)
        backend.dropout_backward(dy, mask, dx, ratio=ratio)
        assert_close(make.host(dx), make.host(dy) * want / (1 - ratio), dtype)
        through = make.empty(shape, dtype, layout)
        backend.dropout_backward(dy, mask, through, y, ratio=ratio)
        np.testing.assert_array_equal(make.host(through), rectified(make.host(dx), make.host(y)))
        backend.dropout_forward(x, x, mask, ratio=ratio, key=dropout_key(backend, *key))
        np.testing.assert_array_equal(make.host(x), make.host(y))
        backend.dropout_backward(dy, mask, dy, ratio=ratio)
        np.testing.assert_array_equal(make.host(dy), make.host(dx))


def test_a_long_mask_is_one_stream(backend, make) -> None:
    """Long enough for several pieces or threads, and of no even length."""
    count, key = 300_007, (5, 7, 11)
    x, y, mask = make(np.ones(count)), make.empty((count,)), make.empty((count,), "uint8")
    backend.dropout_forward(x, y, mask, ratio=0.25, key=dropout_key(backend, *key))
    generator = np.random.Philox(key=np.array([5, 7], np.uint64), counter=np.array([0, 0, 11, 0], np.uint64))
    words = generator.random_raw(-(-count // 4))
    drawn = np.stack([(words >> np.uint64(s)) & np.uint64(0xFFFF) for s in (0, 16, 32, 48)], axis=1).reshape(-1)[:count]
    np.testing.assert_array_equal(make.host(mask), drawn >= 16384)
    assert_close(make.host(y), (drawn >= 16384) / 0.75)
    assert abs(make.host(mask).mean() - 0.75) < 0.004  # five standard deviations


def test_other_layers_seeds_and_iterations_draw_other_masks(backend, make) -> None:
    masks = []
    for key in ((1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4)):
        mask = make.empty((101,), "uint8")
        backend.dropout_forward(make(np.ones(101)), make.empty((101,)), mask, ratio=0.5, key=dropout_key(backend, *key))
        masks.append(tuple(make.host(mask)))
    assert len(set(masks)) == 4


def test_ratio_zero_keeps_all(backend, make) -> None:
    x, y, mask = make(np.arange(11.0)), make.empty((11,)), make.empty((11,), "uint8")
    backend.dropout_forward(x, y, mask, ratio=0.0, key=dropout_key(backend, 1, 2, 3))
    assert make.host(y).tolist() == list(range(11))
