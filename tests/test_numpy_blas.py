"""Small products take one thread of NumPy's BLAS, and larger ones as many as they were given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from caffelite.backends.numpy import blas, common


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the number of threads, 4 at first, is set to, one after another."""
    numbers = [4]
    monkeypatch.setattr(blas, "calls", lambda: (lambda: numbers[-1], numbers.append))
    return numbers


def test_the_blas_of_numpys_wheels_is_found() -> None:
    libraries = Path(np.__file__).parent.parent / "numpy.libs"
    if not any(libraries.glob("*openblas*")):
        pytest.skip("this NumPy has another BLAS")
    found = blas.calls()
    assert found is not None
    tell, put = found
    before = tell()
    try:
        put(2)
        with blas.one_thread():
            assert tell() == 1
        assert tell() == 2
    finally:
        put(before)


def test_the_number_of_threads_comes_back_after_an_error(told: list[int]) -> None:
    with pytest.raises(ValueError, match="matmul"):
        common.multiplied(np.ones((2, 3)), np.ones((2, 3)))
    assert told == [4, 1, 4]


@pytest.mark.parametrize(("rows", "want"), [(1 << 10, [4, 1, 4]), ((1 << 10) + 1, [4])])
def test_small_products_take_one_thread(told: list[int], rows: int, want: list[int]) -> None:
    left, right = np.ones((rows, 64), np.float32), np.full((64, 64), 2, np.float32)
    np.testing.assert_array_equal(common.multiplied(left, right), np.full((rows, 64), 128, np.float32))
    assert told == want


def test_one_thread_is_left_as_it_is(told: list[int]) -> None:
    told.append(1)
    common.multiplied(np.ones((2, 3)), np.ones((3, 2)))
    assert told == [4, 1]


def test_another_blas_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "calls", lambda: None)
    np.testing.assert_array_equal(common.multiplied(np.ones((2, 3)), np.ones((3, 2))), np.full((2, 2), 3))


def test_a_blas_of_another_name_or_without_these_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy.libs").mkdir()
    monkeypatch.setattr(np, "__file__", str(tmp_path / "numpy" / "__init__.py"))
    assert blas.calls.__wrapped__() is None
    (tmp_path / "numpy.libs" / "libopenblas.so").write_bytes(b"no library")
    assert blas.calls.__wrapped__() is None
