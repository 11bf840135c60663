"""Which samples an epoch shows: exactly n of them, each with its probability, wherever reading starts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError
from data.order.choice import ONE, Choice
from data.order.mixture import Mixture, shares
from data.order.order import ORDER_VERSION, Order
from data.order.samplers import MicroBatches

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=20).map(np.array)
seeds = st.integers(0, 2**32)
epochs = st.integers(0, 1000)
windows = st.integers(1, 8)
lanes = st.tuples(st.integers(1, 5), st.integers(1, 25))  # lanes, batch


def choose(sizes: np.ndarray, probabilities: np.ndarray, seed: int = 0) -> Choice:
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return Choice(sizes, lambda shard: probabilities[starts[shard] : starts[shard + 1]], seed)


def drawn(sizes: np.ndarray, seed: int) -> np.ndarray:
    """Returns probabilities of which some are 0, some 1, some tiny and the rest between; their sum is at least 1."""
    noise = np.random.default_rng(seed)
    kinds = noise.choice(4, sizes.sum())
    values = np.select(
        [kinds == 0, kinds == 1, kinds == 2], [0, ONE, noise.integers(1, 9, sizes.sum())], noise.integers(1, ONE)
    )
    values[0] = ONE
    return values.astype(np.int64)


def expected(choice: Choice) -> np.ndarray:
    """Returns the probabilities with which the samples come."""
    return np.concatenate([choice.scaled(shard) for shard in range(len(choice.sizes))]) / ONE


def test_order_version_1_chooses_the_recorded_samples():
    """Checkpoints rely on it: a change here needs a new ORDER_VERSION."""
    assert ORDER_VERSION == 1
    sizes = np.array([5, 3, 7, 4])
    choice = choose(sizes, np.arange(19) * (ONE // 20), seed=7)
    order = Order(sizes, 7, window=2, choice=choice)
    assert order.samples(3, 0, len(order)).tolist() == [8, 9, 13, 11, 6, 18, 17, 16, 3]
    assert choice.digest == "ca326b9f87b93657"


@given(sizes, seeds, epochs, windows, lanes)
def test_each_epoch_has_exactly_the_rounded_sum_of_the_probabilities(sizes, seed, epoch, window, lanes):
    values = drawn(sizes, seed)
    choice = choose(sizes, values, seed)
    order = Order(sizes, seed, window, *lanes, choice=choice)
    samples = order.samples(epoch, 0, len(order))
    assert len(order) == len(set(samples.tolist())) == (2 * int(values.sum()) + ONE) // (2 * ONE)
    assert (values[samples] > 0).all()
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    counts = choice.counts(epoch)
    np.testing.assert_array_equal(np.bincount(shard_of[samples], minlength=len(sizes)), counts)


@given(sizes, seeds)
def test_scaled_probabilities_sum_to_whole_samples_and_stay_close_to_the_given_ones(sizes, seed):
    values = drawn(sizes, seed)
    choice = choose(sizes, values)
    scaled = np.concatenate([choice.scaled(shard) for shard in range(len(sizes))])
    assert scaled.sum() == choice.n * ONE and scaled.min() >= 0 and scaled.max() <= ONE
    assert not scaled[values == 0].any()
    gap = abs(int(values.sum()) - choice.n * ONE)
    assert gap <= ONE // 2 and abs(scaled - values).sum() <= gap + len(values)  # all are moved in the same direction


def test_frequencies_over_200_epochs_match_the_probabilities():
    """Pearson's χ² of the frequencies has one degree of freedom for each sample, less than one for the fixed sum."""
    sizes, noise = np.full(20, 40), np.random.default_rng(0)
    values = (noise.gamma(2, 0.2, sizes.sum()).clip(0, 1) * ONE).astype(np.int64)
    values[::7], values[::11] = 0, ONE
    choice = choose(sizes, values, seed=3)
    order, found = Order(sizes, 3, window=4, choice=choice), np.zeros(len(values))
    for epoch in range(200):
        samples = order.samples(epoch, 0, len(order))
        assert len(samples) == choice.n == round(values.sum() / ONE)
        found[samples] += 1
    p = expected(choice)
    assert not found[p == 0].any() and (found[p == 1] == 200).all()
    between = (p > 0) & (p < 1)
    squares = (found - 200 * p)[between] ** 2 / (200 * p * (1 - p))[between]
    degrees = between.sum()
    assert degrees > 500 and abs(squares.sum() - degrees) < 4 * np.sqrt(2 * degrees)
    pairs = np.corrcoef(found[between][:-1] - 200 * p[between][:-1], found[between][1:] - 200 * p[between][1:])[0, 1]
    assert abs(pairs) < 0.15  # neighbours in a shard are not chosen by turns


@given(sizes, seeds, epochs, windows, lanes, st.data())
def test_chosen_order_from_a_position_equals_the_rest_of_an_iteration(sizes, seed, epoch, window, lanes, data):
    values = drawn(sizes, seed)
    order = Order(sizes, seed, window, *lanes, choice=choose(sizes, values, seed))
    whole = order.samples(epoch, 0, len(order))
    start = data.draw(st.integers(0, len(order) - 1))
    again = Order(sizes, seed, window, *lanes, choice=choose(sizes, values, seed))
    np.testing.assert_array_equal(again.samples(epoch, start, len(order)), whole[start:])
    now, _ = order.windows(epoch, start)
    first = start // order.batch * order.batch
    shards = np.searchsorted(
        np.cumsum(sizes), order.samples(epoch, first, min(len(order), first + order.batch)), "right"
    )
    assert set(shards.tolist()) <= set(now) and (order.choice.counts(epoch)[now] > 0).all()


def test_seeking_asks_for_the_probabilities_of_one_window():
    sizes, asked = np.full(100, 10), []

    def probabilities(shard: int) -> np.ndarray:
        asked.append(shard)
        return np.full(10, ONE // 3)

    order = Order(sizes, 0, window=4, choice=Choice(sizes, probabilities, 0))
    assert asked == list(range(100))  # once, for the sums
    asked.clear()
    order.samples(5, 200, 201)
    assert len(asked) == 4 and set(asked) <= set(order.windows(5, 200)[0])


def test_ranks_share_the_chosen_samples_of_each_global_batch():
    sizes = np.full(10, 30)
    order = Order(sizes, 1, window=3, lanes=2, batch=12, choice=choose(sizes, drawn(sizes, 1), 1))
    one = [part.samples for part in MicroBatches(order, lambda: 30, 12, 12)]
    three = [[part.samples for part in MicroBatches(order, lambda: 30, 12, 4, rank, 3)] for rank in range(3)]
    assert len(one) == len(order) // 12 - 30 % (len(order) // 12)
    for number, samples in enumerate(one):
        np.testing.assert_array_equal(np.concatenate([parts[number] for parts in three]), samples)


def test_mixture_of_chosen_data_sets_keeps_its_shares_and_numbers():
    both = [np.array([10, 12, 8]), np.array([40, 40])]
    values = [np.full(30, ONE // 2), np.where(np.arange(80) % 4, 0, ONE)]
    orders = [Order(sizes, 0, window=2, choice=choose(sizes, some)) for sizes, some in zip(both, values, strict=True)]
    mixed = Mixture(orders, shares([1.0, 1.0], 10))
    assert len(mixed) == 15 + 20
    for epoch in range(5):
        for start in range(0, 30, 10):
            samples = mixed.samples(epoch, start, start + 10)
            second = samples[samples >= 30]
            assert len(second) == 5 and not ((second - 30) % 4).any()


def test_probabilities_that_leave_no_image_are_refused():
    with pytest.raises(DataError, match=r"leaves no image for an epoch: the probabilities of all 40 sum to 0\.4"):
        choose(np.array([40]), np.full(40, ONE // 100))
