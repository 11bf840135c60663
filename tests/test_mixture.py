"""Several data sets in one stream: constant shares, no sample twice in a pass, any position at once."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.datamodule import DataConfig, ShardDataModule
from data.errors import DataError
from data.order.mixture import Mixture, shares
from data.order.order import Order
from data.pack.image_folder import find_images
from data.pack.pack import pack

SIZES = ([10, 12, 8], [40, 40], [7])


def mixture(seed: int = 0, batch: int = 20) -> Mixture:
    return Mixture([Order(np.array(sizes), seed, window=2) for sizes in SIZES], shares([1.0, 3.0, 1.0], batch))


def test_batches_have_constant_shares_in_mixed_order():
    mixed = mixture()
    assert mixed.counts == [4, 12, 4] and len(mixed) == 117
    for epoch in (0, 1, 7):
        for start in range(0, 100, 20):
            sets = np.searchsorted([30, 110, 117], mixed.samples(epoch, start, start + 20), side="right")
            assert np.bincount(sets).tolist() == [4, 12, 4]
            assert sets.tolist() != sorted(sets.tolist())


def test_mixed_data_sets_are_each_read_in_whole_passes():
    mixed = mixture()
    batches = [mixed.samples(epoch, start, start + 20) for epoch in range(14) for start in range(0, 100, 20)]
    found = np.concatenate(batches)
    for base, size in ((0, 30), (30, 80), (110, 7)):
        mine = found[(found >= base) & (found < base + size)] - base
        counts = Counter(mine.tolist())
        assert max(counts.values()) - min(counts.values()) <= 1 and len(counts) == size


@given(st.integers(0, 50), st.integers(0, 116), st.integers(0, 2**32))
def test_mixture_from_a_position_equals_the_rest_of_an_iteration(epoch, start, seed):
    mixed = mixture(seed)
    whole = mixed.samples(epoch, 0, 117)
    np.testing.assert_array_equal(mixture(seed).samples(epoch, start, 117), whole[start:])
    now, _ = mixed.windows(epoch, start)
    ends = np.cumsum([size for sizes in SIZES for size in sizes])
    assert int(np.searchsorted(ends, whole[start // 20 * 20], side="right")) in range(len(ends)) and now


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.integers(8, 4096))
def test_shares_are_integers_that_add_up_to_the_batch(weights, batch):
    try:
        counts = shares(weights, batch)
    except DataError as error:
        assert "without a sample" in str(error)
        return
    exact = np.array(weights) / sum(weights) * batch
    assert sum(counts) == batch and np.abs(counts - exact).max() < 1


def test_two_packed_sets_are_mixed_by_weight(tmp_path):
    for name, number, grey in (("dark", 30, 20), ("light", 60, 230)):
        for i in range(number):
            path = tmp_path / name / f"{i:03d}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (24, 24), (grey, grey, grey)).save(path)
        samples, classes, *_ = find_images(tmp_path / name)
        pack(samples, tmp_path / "packed" / name, name=name, classes=classes, shard_size=8)
    paths = [str(tmp_path / "packed" / name) for name in ("dark", "light")]
    config = DataConfig(path=paths, weights=[3, 1], workers=0)
    data = ShardDataModule(config, image_size=(16, 16), channels=3, seed=0, global_batch=16, micro_batch=8)
    per_rank = [list(data.train_loader(lambda: 3, rank, 2)) for rank in range(2)]
    assert [len(batches) for batches in per_rank] == [2, 2]
    for one, other in zip(*per_rank, strict=True):
        dark = torch.cat([one["images"], other["images"]]).float().mean((1, 2, 3)) < 100
        assert dark.sum() == 12
    assert data.identity["weights"] == [3, 1]
    with pytest.raises(DataError, match="number 2 without a sample in a global batch of 16"):
        ShardDataModule(
            DataConfig(path=paths, weights=[1000, 1]),
            image_size=(16, 16),
            channels=3,
            seed=0,
            global_batch=16,
            micro_batch=8,
        )
