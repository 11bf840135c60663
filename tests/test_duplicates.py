"""Near-duplicates: python -m data.inspect --duplicates, and the rule that keeps one of each group."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from scipy.fft import dctn

from data.config import DataConfig
from data.datamodule import ShardDataModule
from data.errors import DataError
from data.index.index import ShardIndex, open_shards
from data.index.sample_table import NOT_LOOKED_AT, UNREADABLE, new_rows, write_rows
from data.inspect.duplicates import close_pairs, find_duplicates, group_duplicates, perceptual_hash, reduce
from tests.test_index import write_tar
from tests.test_inspect import encoded, findings

COUNT = 40  # photographs


def jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photographs(real_images: Path) -> list[Image.Image]:
    index = open_shards(str(real_images / "grocery" / "grocery-train-000000.tar"))
    return [Image.open(io.BytesIO(index.read(13 * number))).convert("RGB") for number in range(COUNT // 2)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, photographs: list[Image.Image]) -> Path:
    """Two tars: 20 photographs, of which five come again in another size, light and compression, and one mirrored."""
    folder = tmp_path_factory.mktemp("alike") / "in"
    files = {f"{number:02d}.jpg": jpeg(image, 95) for number, image in enumerate(photographs)}
    write_tar(folder / "a.tar", files)
    copies = {}
    for number, image in enumerate(photographs[:5]):
        small = image.resize((image.width * 2 // 3, image.height * 2 // 3))
        copies[f"copy{number}.jpg"] = jpeg(ImageEnhance.Brightness(small).enhance(0.85), 60)
    large = photographs[4].resize((photographs[4].width * 2, photographs[4].height * 2))
    copies["large4.png"] = encoded(np.asarray(large))
    copies["mirrored.jpg"] = jpeg(photographs[6].transpose(Image.Transpose.FLIP_LEFT_RIGHT), 95)
    copies |= {
        "grey.png": encoded(np.full((50, 50, 3), 128, np.uint8)),
        "white.png": encoded(np.full((9, 9), 255, np.uint8)),
    }
    copies["torn.jpg"] = jpeg(photographs[0], 95)[:900]
    write_tar(folder / "b.tar", copies)
    return folder


def keys(index: ShardIndex, groups: np.ndarray) -> dict[str, str]:
    return {
        index.key(sample): index.key(int(kept))
        for sample, kept in enumerate(groups)
        if kept not in (sample, UNREADABLE)
    }


def test_changed_copies_of_photographs_are_grouped_and_the_largest_is_kept(shards: Path) -> None:
    index = open_shards(shards)
    groups, sizes = find_duplicates(index)
    found = {f"copy{number}": f"{number:02d}" for number in range(4)}
    assert keys(index, groups) == found | {"copy4": "large4", "04": "large4"}
    torn = [index.key(sample) for sample in np.flatnonzero(sizes == 0)]
    assert torn == ["torn"] and np.flatnonzero(groups == UNREADABLE).tolist() == np.flatnonzero(sizes == 0).tolist()


def test_hash_is_the_sign_of_the_lowest_frequencies_around_their_median(photographs: list[Image.Image]) -> None:
    for image in photographs[:5]:
        grey = reduce(jpeg(image, 90))
        low = dctn(grey.astype(float), type=2)[:8, :8].ravel()
        bits = "".join(str(int(value > np.median(low))) for value in low)
        assert perceptual_hash(grey) == int(bits, 2) and bits.count("1") == 32
    pixels = np.asarray(photographs[0].resize((200, 200)))
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    assert np.bitwise_count(perceptual_hash(reduce(buffer.getvalue())) ^ perceptual_hash(reduce(encoded(pixels)))) <= 1


@given(st.integers(0, 2**32), st.integers(2, 60))
def test_bands_find_all_pairs_within_three_bits(seed: int, count: int) -> None:
    noise = np.random.default_rng(seed)
    hashes = noise.integers(0, 2**64, count, np.uint64)
    for place in range(1, count):
        if noise.random() < 0.7:
            flipped = sum(1 << int(bit) for bit in noise.choice(64, noise.integers(1, 6), replace=False))
            hashes[place] = hashes[place - 1] ^ np.uint64(flipped)
    hashes = np.unique(hashes)
    found = {tuple(sorted(pair)) for pair in zip(*(column.tolist() for column in close_pairs(hashes)), strict=True)}
    apart = np.bitwise_count(hashes[:, None] ^ hashes)
    assert found == {(i, j) for i in range(len(hashes)) for j in range(i + 1, len(hashes)) if apart[i, j] <= 3}


def test_groups_are_components_of_which_the_first_of_the_largest_is_kept() -> None:
    chain = np.array([0b0, 0b111, 0b111111, 0xFF << 40, (0xFF << 40) + 1, 0b111, 0xFF << 56], np.uint64)
    areas = np.array([5, 9, 9, 4, 8, 9, 1])
    assert group_duplicates(chain, areas).tolist() == [1, 1, 1, 4, 4, 1, 6]
    assert group_duplicates(chain[:0], areas[:0]).tolist() == []


def test_groups_go_into_a_new_table_and_into_one_with_losses(shards: Path, tmp_path: Path) -> None:
    index = open_shards(shards)
    groups, sizes = find_duplicates(index)
    found = findings(shards, "--duplicates", "--table", str(tmp_path / "new.npy"))
    rows = np.load(tmp_path / "new.npy")
    assert rows["group"].tolist() == groups.tolist() and rows["size"].tolist() == sizes.tolist()
    assert np.isnan(rows["loss"]).all()
    named = [[place["key"] for place in group] for group in found["near_duplicates"]]
    assert sorted(named) == [
        ["00", "copy0"],
        ["01", "copy1"],
        ["02", "copy2"],
        ["03", "copy3"],
        ["large4", "04", "copy4"],
    ]
    assert found["different"] == len(index) - 7

    other = new_rows(index, np.arange(len(index)))[:3]
    other["shard"] += np.uint64(1)
    losses = new_rows(index, np.arange(len(index)))
    losses["loss"] = np.linspace(0, 1, len(index))
    write_rows(tmp_path / "both.npy", np.concatenate([other, losses]))  # other shards before these
    findings(shards, "--duplicates", "--table", str(tmp_path / "both.npy"))
    rows = np.load(tmp_path / "both.npy")
    assert rows["group"].tolist() == [NOT_LOOKED_AT] * 3 + [n if n < 0 else n + 3 for n in groups.tolist()]
    assert np.array_equal(rows["loss"][3:], losses["loss"]) and np.array_equal(
        rows[:3]["loss"], other["loss"], equal_nan=True
    )
    for table in ("new.npy", "both.npy"):
        assert sorted(shown(shards, tmp_path / table)) == np.flatnonzero(groups == np.arange(len(groups))).tolist()


def shown(shards: Path, table: Path) -> list[int]:
    config = DataConfig.model_validate({"path": str(shards), "sampling": str(table), "rule": {"unique": True}})
    data = ShardDataModule(config, image_size=(32, 32), channels=3, seed=0, global_batch=2, micro_batch=2)
    return data.order.samples(3, 0, len(data.order)).tolist()


def test_table_of_other_shards_and_table_without_duplicates_are_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--table t\.npy is for the groups that --duplicates finds"):
        findings(shards, "--table", "t.npy")
    index = open_shards(shards)
    write_rows(tmp_path / "few.npy", new_rows(index, np.arange(7)))
    before = (tmp_path / "few.npy").read_bytes()
    with pytest.raises(DataError, match=r"few\.npy does not match the shards"):
        findings(shards, "--duplicates", "--table", str(tmp_path / "few.npy"))
    assert (tmp_path / "few.npy").read_bytes() == before
