"""The images that come with installed packages."""

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from data.errors import DataError
from data.images.decode import decode, read_header
from data.index.index import ShardIndex, open_shards
from data.pack import builtin
from data.storage.read import read


def pictures(index: ShardIndex, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [n, h·w] in grey and labels [n] of all samples."""
    images, labels = [], []
    for sample in range(len(index)):
        shard, offset, length = index.locate(sample)
        data = read(index.shards[shard], offset, length)
        with Image.open(io.BytesIO(data)) as image:
            box = (0, 0, image.height, image.width)
        images.append(decode(data, read_header(data), [box], size, 1)[0].numpy().ravel())
        labels.append(index.label(sample))
    return np.array(images), np.array(labels)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("datasets")


def test_built_in_digits_equal_those_of_scikit_learn(root):
    folder = builtin.ensure("digits", root)
    train, test = open_shards(folder, "train"), open_shards(folder, "test")
    assert (len(train), len(test)) == (1438, 359)
    keys = {index.key(sample) for index in (train, test) for sample in range(len(index))}
    assert len(keys) == 1797
    values, labels = load_digits(return_X_y=True)
    images, found = pictures(train, (8, 8))
    for sample in range(0, 1438, 97):
        number = int(train.key(sample).split("/")[1])
        assert found[sample] == labels[number]
        assert np.corrcoef(images[sample], values[number])[0, 1] > 0.95
    share = np.bincount(pictures(test, (8, 8))[1]) / np.bincount(labels)
    assert np.all(np.abs(share - 0.2) < 0.01)


def test_copies_of_a_placed_digit_lie_in_one_part_at_other_places(root):
    folder = builtin.ensure("placed_digits", root)
    parts = {part: open_shards(folder, part) for part in ("train", "test")}
    keys = {part: [index.key(sample) for sample in range(len(index))] for part, index in parts.items()}
    assert {part: len(found) for part, found in keys.items()} == {"train": 2876, "test": 718}
    assert not {key[:-2] for key in keys["train"]} & {key[:-2] for key in keys["test"]}
    images, _ = pictures(parts["test"], (32, 32))
    boxes = set()
    for ink in images.reshape(-1, 32, 32) > 0:
        (rows, columns), (height, width) = np.nonzero(ink)[:2], np.ptp(np.nonzero(ink), axis=1) + 1
        assert height <= 24 and width <= 24
        boxes.add((int(rows.min()), int(columns.min())))
    assert len(boxes) > 100


def test_nearest_neighbour_classifies_built_in_digits_above_97_percent(root):
    folder = builtin.ensure("digits", root)
    train, test = (pictures(open_shards(folder, part), (32, 32)) for part in ("train", "test"))
    assert KNeighborsClassifier(1).fit(*train).score(*test) > 0.97


def test_built_in_test_photos_share_no_pixel_with_training_photos(root):
    folder = builtin.ensure("photos", root)
    train, test = open_shards(folder, "train"), open_shards(folder, "test")
    assert len(train) > 1000 and len(test) > 90

    def places(index: ShardIndex) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for sample in range(len(index)):
            photo, place = index.key(sample).split("/")
            found.setdefault(photo, []).append(int(place.split("_")[1]))
        return found

    lefts, rights = places(train), places(test)
    assert lefts.keys() == rights.keys() and len(lefts) >= 15
    assert all(max(lefts[photo]) + builtin.CROP <= min(rights[photo]) for photo in lefts)


def test_built_in_data_set_is_packed_once(root):
    folder = builtin.ensure("digits", root)
    before = open_shards(folder, "train").fingerprint
    assert builtin.ensure("digits", root) == folder and open_shards(folder, "train").fingerprint == before


def test_unwritable_data_root_raises_data_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be created .* Set data\.root"):
        builtin.ensure("digits", tmp_path / "file")
