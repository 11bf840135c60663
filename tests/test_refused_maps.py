"""Label maps and tables that would give wrong numbers are refused."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data.inspect.duplicates as duplicates
from data.errors import DataError
from data.images.label_maps import read_classes
from data.index.index import ShardIndex, open_shards
from data.index.naming import read_naming
from data.index.sample_table import new_rows, write_rows
from mae.errors import ConfigError
from mae.probes.dense_targets import find_classes
from tests.test_index import write_tar


def encoded(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "train-000000.tar", {"a.jpg": encoded("JPEG")})


def test_a_grey_photograph_is_no_map() -> None:
    assert read_classes(encoded("PNG")).max() == 255
    with pytest.raises(DataError, match="its map is a JPEG"):
        read_classes(encoded("JPEG"))


def test_numbers_of_objects_are_no_classes() -> None:
    with pytest.raises(ConfigError, match="hold the value 65005, and classes are 0 … 4095"):
        find_classes([torch.tensor([[0, 65005]])], [], 255)


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ({"void": -1}, "`void` -1, which"),
        ({"void": 70_000}, "`void` 70000, which"),
        ({"label_maps": ["png"]}, "no object"),
    ],
)
def test_a_manifest_of_another_form_is_refused(shard: Path, manifest: dict[str, object], said: str) -> None:
    (shard.parent / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=said):
        read_naming([str(shard)])


def test_a_table_of_other_shards_is_refused_before_images_are_read(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_all(index: ShardIndex, jobs: int) -> None:
        raise AssertionError("all images were read")

    monkeypatch.setattr(duplicates, "find_duplicates", read_all)
    index = open_shards(str(shard.parent), "train")
    rows = new_rows(index, np.arange(len(index)))
    rows["shard"] += 1
    write_rows(tmp_path / "table.npy", rows)
    with pytest.raises(DataError, match="does not match the shards"):
        duplicates.near_duplicates(index, 1, tmp_path / "table.npy")
