"""Order and random words: pure functions of (seed, stream, position)."""

from __future__ import annotations

import numpy as np
import pytest

from caffelite.data.order import Order, class_by_class, permutation, warp_words_at, words_at


def test_words_do_not_depend_on_where_reading_began() -> None:
    whole = words_at(5, 6, 0, 100)
    for start, count in ((0, 1), (1, 7), (4, 4), (37, 63), (99, 1)):
        np.testing.assert_array_equal(words_at(5, 6, start, count), whole[start : start + count])
    assert len(np.unique(whole)) == 100


def test_words_are_numpys_philox() -> None:
    generator = np.random.Philox(key=[5, 6], counter=[2**40, 0, 0, 1])
    np.testing.assert_array_equal(words_at(5, 6, 2**42, 8), generator.random_raw(8))


def test_warp_words_of_a_position_do_not_depend_on_where_reading_began_and_are_others() -> None:
    whole = warp_words_at(5, 6, 0, 50)
    assert whole.shape == (50, 4)
    for start, count in ((0, 1), (1, 7), (37, 13)):
        np.testing.assert_array_equal(warp_words_at(5, 6, start, count), whole[start : start + count])
    assert len(np.unique(np.concatenate([whole.ravel(), words_at(5, 6, 0, 200)]))) == 400
    generator = np.random.Philox(key=[5, 6], counter=[2**40, 0, 0, 3])
    np.testing.assert_array_equal(warp_words_at(5, 6, 2**40, 2).ravel(), generator.random_raw(8))


@pytest.mark.parametrize(("seed", "stream"), [(6, 6), (5, 7), (-1, 6)])
def test_other_seeds_and_streams_give_other_words_and_orders(seed: int, stream: int) -> None:
    assert not np.intersect1d(words_at(seed, stream, 0, 50), words_at(5, 6, 0, 50)).size
    assert permutation(seed, stream, 0, 50).tolist() != permutation(5, 6, 0, 50).tolist()


def test_every_epoch_covers_all_records_once_in_a_new_order() -> None:
    order = Order(17, True, 5, 6)
    numbers = order.numbers(0, 17 * 5)
    epochs = [numbers[i : i + 17] for i in range(0, len(numbers), 17)]
    assert all(sorted(epoch) == list(range(17)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_permutations_are_uniform() -> None:
    counts = np.zeros((4, 4))
    for epoch in range(2000):
        counts[np.arange(4), permutation(1, 2, epoch, 4)] += 1
    assert np.abs(counts - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)  # five standard deviations


def test_any_batch_anywhere_is_a_part_of_the_whole() -> None:
    whole = Order(7, True, 1, 2).numbers(0, 70)
    for start, length in ((3, 10), (0, 7), (69, 1), (20, 25)):
        assert Order(7, True, 1, 2).numbers(start, length) == whole[start : start + length]


def test_without_shuffle_keys_follow_each_other() -> None:
    assert Order(5, False, 1, 2).numbers(3, 9) == [3, 4, 0, 1, 2, 3, 4, 0, 1]


@pytest.mark.parametrize(
    ("labels", "want"),
    [
        ([], False),
        ([3], False),
        ([3, 3, 3], False),
        ([0, 0, 1, 1], True),
        ([2, 0, 0, 1], True),
        ([0, 1, 0], False),
        ([0, 1, 2], True),
        ([0, 0, 1, 2, 1], False),
    ],
)
def test_records_that_lie_class_by_class(labels: list[int], want: bool) -> None:
    assert class_by_class(labels) is want
