"""Arrays of a GPU as pycaffe shows them: what is written arrives, what is computed is seen, also through arrays fetched long before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from caffelite.pycaffe.mirror import Mirror, called_back, engine_runs, shown


@pytest.fixture
def array(cuda: Any) -> Any:
    x = cuda.empty((2, 3, 4, 5), "float32")
    cuda.from_host(np.arange(120.0).reshape(2, 3, 4, 5), x)
    return x


@pytest.fixture
def mirrors() -> Iterator[dict[str, Mirror]]:
    kept: dict[str, Mirror] = {}
    yield kept
    kept.clear()


def test_a_cpus_array_is_shown_itself(reference: Any, mirrors: dict[str, Mirror]) -> None:
    x = reference.empty((2, 3), "float32")
    assert shown(mirrors, "data", reference, x) is x
    assert not mirrors


def test_what_is_written_arrives_when_the_engine_runs(cuda: Any, array: Any, mirrors: dict[str, Mirror]) -> None:
    seen = shown(mirrors, "data", cuda, array)
    np.testing.assert_array_equal(seen, np.arange(120).reshape(2, 3, 4, 5))
    seen[1, 2, 3, 4] = -7
    with engine_runs():
        assert cuda.to_host(array)[1, 2, 3, 4] == -7
        cuda.fill(array, 3)
    assert shown(mirrors, "data", cuda, array) is seen
    assert (seen == 3).all()


def test_an_array_fetched_before_the_engine_ran_may_be_written(cuda: Any, array: Any, mirrors: dict[str, Mirror]) -> None:
    """One element is written, the others are the GPU's, which are newer."""
    seen = shown(mirrors, "data", cuda, array)
    with engine_runs():
        cuda.fill(array, 3)
    seen[0, 0, 0, 0] = 8
    with engine_runs():
        want = np.full((2, 3, 4, 5), 3.0)
        want[0, 0, 0, 0] = 8
        np.testing.assert_array_equal(cuda.to_host(array), want)


def test_nan_and_signed_zero_count_as_written(cuda: Any, array: Any, mirrors: dict[str, Mirror]) -> None:
    seen = shown(mirrors, "data", cuda, array)
    seen[...] = 0
    with engine_runs():
        pass
    seen[0, 0, 0, 0], seen[0, 0, 0, 1] = np.nan, -0.0
    with engine_runs():
        got = cuda.to_host(array)
    assert np.isnan(got[0, 0, 0, 0])
    assert np.signbit(got[0, 0, 0, 1])


def test_a_callback_sees_and_writes(cuda: Any, array: Any, mirrors: dict[str, Mirror]) -> None:
    def double() -> None:
        shown(mirrors, "data", cuda, array)[...] *= 2

    with engine_runs():
        cuda.fill(array, 3)
        called_back(double)()
        assert (cuda.to_host(array) == 6).all()


def test_two_blobs_over_one_array_show_one_mirror(cuda: Any, array: Any, mirrors: dict[str, Mirror]) -> None:
    assert shown(mirrors, "one", cuda, array) is shown(mirrors, "two", cuda, array)
