"""Kept features are used only when everything that they depend on is the same."""

from pathlib import Path

import pytest
import torch

from mae.probes.feature_cache import FeatureCache, weights_fingerprint
from mae.probes.features import Features

KEY = {"weights": "a", "images": {"fingerprint": "b"}}


def some(samples: list[int]) -> Features:
    return Features(torch.tensor(samples), torch.tensor(samples) % 3, torch.randn(len(samples), 8))


def features_equal(one: Features | None, other: Features) -> bool:
    return one is not None and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_cached_features_are_found_for_all_or_some_of_their_samples(tmp_path: Path) -> None:
    cache, features = FeatureCache(tmp_path, 1e6), some([1, 4, 5, 9])
    cache.keep(KEY, features)
    assert features_equal(cache.find(KEY, features.samples), features)
    assert features_equal(cache.find(KEY, torch.tensor([4, 9])), Features(*(column[[1, 3]] for column in features)))
    assert cache.find(KEY, torch.tensor([4, 6])) is None
    assert cache.find(KEY | {"weights": "c"}, features.samples) is None
    assert cache.find(KEY | {"images": {"fingerprint": "d"}}, features.samples) is None
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign"])
def test_damaged_cache_file_is_removed_with_a_warning(tmp_path: Path, damage: str) -> None:
    cache, features = FeatureCache(tmp_path, 1e6), some(list(range(100)))
    cache.keep(KEY, features)
    (file,) = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes({"cut": data[:500], "flipped": data, "foreign": b"text"}[damage])
    with pytest.warns(UserWarning, match="extracted anew"):
        assert cache.find(KEY, features.samples) is None
    assert not file.exists()
    cache.keep(KEY, features)
    assert features_equal(cache.find(KEY, features.samples), features)


def test_features_that_another_evaluation_has_kept_and_mapped_are_not_replaced(tmp_path: Path) -> None:
    cache, first = FeatureCache(tmp_path, 1e6), some([1, 2])
    cache.keep(KEY, first)
    (file,) = tmp_path.iterdir()
    before = file.stat().st_ino
    cache.keep(KEY, some([1, 2]))
    assert file.stat().st_ino == before and features_equal(cache.find(KEY, first.samples), first)
    for features, unreadable in ((some([1, 3]), None), (some([1, 2]), torch.tensor([7]))):  # so many, but others
        cache.keep(KEY, features, unreadable)
        asked = features.samples if unreadable is None else torch.tensor([1, 2, 7])
        assert features_equal(cache.find(KEY, asked), features)


def test_cached_features_are_found_by_part_of_their_key(tmp_path: Path) -> None:
    cache, features = FeatureCache(tmp_path, 1e6), [some([1, 2]), some([3]), some([4, 5])]
    for number, key in enumerate((KEY, KEY | {"kind": "patches"}, KEY | {"weights": "c"})):
        cache.keep(key, features[number])
    (tmp_path / "damaged.pt").write_bytes(b"text")
    with pytest.warns(UserWarning, match="passed over"):
        found = list(cache.kept(weights="a"))
    (tmp_path / "damaged.pt").unlink()
    assert [key.get("kind") for key, _ in found] == ["patches", None]  # newest first
    assert features_equal(found[0][1], features[1]) and features_equal(found[1][1], features[0])
    assert [key["weights"] for key, _ in cache.kept(images=KEY["images"])] == ["c", "a", "a"]


def test_cache_file_named_for_another_key_is_not_used(tmp_path: Path) -> None:
    cache, features = FeatureCache(tmp_path, 1e6), some([1, 2])
    cache.keep(KEY, features)
    (file,) = tmp_path.iterdir()
    cache.keep(KEY | {"weights": "c"}, features)
    (other,) = set(tmp_path.iterdir()) - {file}
    other.replace(file)
    assert cache.find(KEY, features.samples) is None


def test_cache_above_its_limit_drops_the_oldest_features(tmp_path: Path) -> None:
    features = some(list(range(1000)))
    cache = FeatureCache(tmp_path, 120_000)
    for number in range(4):
        cache.keep(KEY | {"weights": str(number)}, features)
    kept = [number for number in range(4) if cache.find(KEY | {"weights": str(number)}, features.samples)]
    assert kept == [2, 3]
    nothing = FeatureCache(tmp_path / "none", 0)
    nothing.keep(KEY, features)
    assert not (tmp_path / "none").exists()


def test_weights_fingerprint_changes_with_the_values_only() -> None:
    torch.manual_seed(0)
    model, other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    assert weights_fingerprint(model) != weights_fingerprint(other)
    other.load_state_dict(model.state_dict())
    assert weights_fingerprint(model) == weights_fingerprint(other)
    other.weight.data[0, 0] += 1e-7
    assert weights_fingerprint(model) != weights_fingerprint(other)
