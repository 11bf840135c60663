"""The order of the samples: a permutation per epoch, independent of ranks, micro-batches and where reading starts."""

import math

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data.order.hashing import uniforms
from data.order.order import ORDER_VERSION, Order, steps_per_epoch
from data.order.samplers import AllSamples, MicroBatches
from mae.train.schedule import split_batch

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=30).map(np.array)
seeds = st.integers(0, 2**32)
epochs = st.integers(0, 1000)
windows = st.integers(1, 20)
lanes = st.tuples(st.integers(1, 6), st.integers(1, 25))  # lanes, batch
# ranks, micro-batch
topologies = st.sampled_from([(1, 24), (1, 4), (2, 12), (2, 3), (3, 8), (3, 1), (4, 3), (6, 2), (8, 3), (8, 1)])


def test_order_version_1_gives_the_recorded_samples_and_draws():
    """Checkpoints rely on it: a change here needs a new ORDER_VERSION."""
    assert ORDER_VERSION == 1
    order = Order(np.array([5, 3, 7, 4]), seed=7, window=2)
    assert order.samples(3, 0, 19).tolist() == [8, 7, 9, 5, 13, 12, 11, 6, 14, 10, 1, 15, 18, 0, 17, 16, 4, 2, 3]
    np.testing.assert_array_equal(uniforms(7, 3, np.array([11]), 2)[0], [0.6412575629833426, 0.4355017533631639])


@given(sizes, seeds, epochs, windows, lanes)
def test_epoch_is_a_permutation_of_all_samples(sizes, seed, epoch, window, lanes):
    order = Order(sizes, seed, window, *lanes)
    assert sorted(order.samples(epoch, 0, len(order))) == list(range(sizes.sum()))


@given(sizes, seeds, epochs, windows, lanes, st.data())
def test_order_from_a_position_equals_the_rest_of_an_iteration(sizes, seed, epoch, window, lanes, data):
    order = Order(sizes, seed, window, *lanes)
    whole = order.samples(epoch, 0, len(order))
    start = data.draw(st.integers(0, len(order)))
    stop = data.draw(st.integers(start, len(order)))
    np.testing.assert_array_equal(Order(sizes, seed, window, *lanes).samples(epoch, start, stop), whole[start:stop])
    np.testing.assert_array_equal(order.samples(epoch, start, stop), whole[start:stop])


@given(sizes, seeds, epochs, windows)
def test_each_window_holds_whole_shards(sizes, seed, epoch, window):
    order = Order(sizes, seed, window)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    visited, start = set(), 0
    while start < len(order):
        shards = set(shard_of[order.samples(epoch, start, start + 1)])
        stop = start + 1
        while stop < len(order) and len(shards) <= window and sum(sizes[list(shards)]) > stop - start:
            shards |= set(shard_of[order.samples(epoch, stop, stop + 1)])
            stop += 1
        assert len(shards) <= window and not shards & visited
        visited |= shards
        start = stop
    assert len(visited) == len(sizes)


@given(seeds, epochs, windows)
def test_lanes_fill_their_own_rows_of_each_batch_from_their_own_shards(seed, epoch, window):
    order = Order(np.full(24, 10), seed, window, lanes=3, batch=12)
    lanes_of_shards: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    for position in range(0, 240, 4):
        shards = order.samples(epoch, position, position + 4) // 10
        lanes_of_shards[position // 4 % 3] |= set(shards.tolist())
    assert sum(map(len, lanes_of_shards.values())) == 24  # No shard is read by two of them.


def test_order_without_lanes_does_not_depend_on_the_batch():
    sizes = np.array([5, 3, 7, 4])
    np.testing.assert_array_equal(Order(sizes, 7, 2, 1, 5).samples(3, 0, 19), Order(sizes, 7, 2).samples(3, 0, 19))


@given(sizes, seeds, epochs, windows, lanes, st.data())
def test_windows_of_a_batch_hold_its_samples(sizes, seed, epoch, window, lanes, data):
    order = Order(sizes, seed, window, *lanes)
    position = data.draw(st.integers(0, len(order) - 1))
    now, _ = order.windows(epoch, position)
    ends = np.cumsum(sizes)
    start = position // order.batch * order.batch
    samples = order.samples(epoch, start, min(len(order), start + order.batch))
    assert set(np.searchsorted(ends, samples, side="right").tolist()) <= set(now)


def test_remainder_left_out_of_an_epoch_changes_with_the_epoch():
    order = Order(np.array([10] * 10 + [3]), seed=0, window=4)
    seen = 32 * steps_per_epoch(len(order), 32)
    left_out = [frozenset(order.samples(epoch, seen, len(order))) for epoch in range(200)]
    assert seen == 96 and len(set(left_out)) > 190
    assert set().union(*left_out) == set(range(len(order)))


def test_epochs_and_seeds_give_different_orders():
    sizes = np.full(20, 50)
    orders = [Order(sizes, seed).samples(epoch, 0, 1000) for seed in (0, 1) for epoch in (0, 1)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).mean() < 0.02


@settings(max_examples=50)
@given(sizes, seeds, topologies, st.integers(0, 60))
def test_global_batches_do_not_depend_on_ranks_and_micro_batches(sizes, seed, topology, step):
    order = Order(np.append(sizes, 24), seed)
    ranks, micro_batch = topology
    one = list(MicroBatches(order, lambda: step, 24, 24))
    steps_per_epoch = len(order) // 24
    assert len(one) == steps_per_epoch - step % steps_per_epoch
    per_rank = [list(MicroBatches(order, lambda: step, 24, micro_batch, rank, ranks)) for rank in range(ranks)]
    accumulate = 24 // (micro_batch * ranks)
    assert {len(draws) for draws in per_rank} == {len(one) * accumulate}
    for number, (epoch, positions, samples, _) in enumerate(one):
        parts = [draws[number * accumulate + j] for draws in per_rank for j in range(accumulate)]
        assert {part[0] for part in parts} == {epoch} == {step // steps_per_epoch}
        np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), positions)
        np.testing.assert_array_equal(np.concatenate([part[2] for part in parts]), samples)


@settings(max_examples=50)
@given(st.integers(1, 9), st.integers(1, 30), st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.integers(30, 64))
def test_uneven_shares_cover_a_global_batch_once_and_differ_by_one_unit(ranks, micro, views, pairs, batch):
    unit = math.lcm(views, pairs)
    batch, micro = batch // unit * unit, -(-micro // unit) * unit
    assume(batch // unit // ranks >= math.ceil(math.ceil(batch // unit / ranks) / (micro // unit)))  # none is empty
    micro, accumulate = split_batch(batch, micro, ranks, unit)
    order = Order(np.array([200]), seed=1)
    shares = [MicroBatches(order, lambda: 1, batch, micro, rank, ranks, views, unit) for rank in range(ranks)]
    assert {draws.accumulate for draws in shares} == {accumulate}
    first = [part for draws in shares for part in list(draws)[:accumulate]]
    np.testing.assert_array_equal(np.concatenate([part.positions for part in first]), np.arange(batch, 2 * batch))
    sizes = {len(part.positions) for part in first}
    assert max(sizes) == micro and min(sizes) > 0 and all(size % unit == 0 for size in sizes)
    totals = [draws.rows[-1] - draws.rows[0] for draws in shares]
    assert max(totals) - min(totals) in (0, unit)


def test_sampler_asks_for_the_step_when_an_iteration_starts():
    order, step = Order(np.array([50]), seed=0), 0
    draws = MicroBatches(order, lambda: step, 10, 5)
    assert len(draws) == 10
    first = [draw.positions[0] for draw in draws]
    step = 3
    assert [draw.positions[0] for draw in draws] == first[6:] and len(draws) == 10
    step = 5  # The edge of the epoch: the next one from its beginning.
    assert [(draw.epoch, draw.positions[0]) for draw in draws] == [(1, start) for start in first]


def test_views_of_an_image_are_adjacent_with_positions_of_their_own():
    order = Order(np.array([50]), seed=0)
    draws = list(MicroBatches(order, lambda: 0, 12, 6, views=3))
    assert len(draws) == 150 // 12 * 2
    samples = np.concatenate([draw.samples for draw in draws])
    assert np.concatenate([draw.positions for draw in draws]).tolist() == list(range(144))
    np.testing.assert_array_equal(samples, np.repeat(order.samples(0, 0, 48), 3))


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 5))
def test_validation_ranks_visit_each_sample_once_in_equally_many_batches(samples, batch, ranks):
    per_rank = [list(AllSamples(np.arange(samples), batch, rank, ranks)) for rank in range(ranks)]
    assert len({len(draws) for draws in per_rank}) == 1
    visited = [sample for draws in per_rank for draw in draws for sample in draw.samples]
    assert sorted(visited) == list(range(samples))
    assert all(len(draw.samples) <= batch for draws in per_rank for draw in draws)


def test_uniforms_are_uniform_and_determined_by_seed_epoch_and_position():
    u = uniforms(0, 0, np.arange(20_000), 5)
    assert u.shape == (20_000, 5) and u.min() >= 0 and u.max() < 1
    np.testing.assert_allclose(u.mean(0), 0.5, atol=0.01)
    np.testing.assert_allclose(u.std(0), 12**-0.5, atol=0.01)
    np.testing.assert_allclose(np.corrcoef(u.T), np.eye(5), atol=0.03)
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.03
    np.testing.assert_array_equal(uniforms(0, 0, np.array([17, 4]), 2), u[[17, 4], :2])
    for other in (uniforms(1, 0, np.arange(100), 5), uniforms(0, 1, np.arange(100), 5)):
        assert (other == u[:100]).sum() == 0


def test_seek_in_eleven_million_samples_permutes_one_window():
    """benchmarks/index.py has the time."""
    order = Order(np.full(11_000, 1000), seed=5)
    assert len(order.samples(3, 7_654_321, 7_654_385)) == 64
    assert [len(window) for window in order._windows.values()] == [16_000]
