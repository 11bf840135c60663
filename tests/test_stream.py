"""From shards to batches: the same whatever reads them, and clear about what cannot be read."""

import os
import signal
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from data.datamodule import DataConfig, ShardDataModule
from data.errors import DataError
from data.index.index import open_shards
from data.pack import builtin
from data.pack.image_folder import find_images
from data.pack.pack import pack


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """103 images of many shapes in shards of 10, with a val part of 17."""
    root = tmp_path_factory.mktemp("stream")
    noise = np.random.default_rng(0)
    for part, number in (("train", 103), ("val", 17)):
        for i in range(number):
            path = root / "images" / part / f"class{i % 3}" / f"{i:03d}.{'png' if i % 4 else 'jpg'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            small = noise.integers(0, 255, (6, 7, 3), np.uint8)
            Image.fromarray(small).resize((40 + i % 30, 36 + i % 17)).save(path)
        samples, classes, *_ = find_images(root / "images" / part)
        pack(samples, root / "packed" / part, name=f"x-{part}", classes=classes, shard_size=10)
    return root / "packed"


def module(path, **changes) -> ShardDataModule:
    shape = {"image_size": (24, 32), "channels": 3, "seed": 3, "global_batch": 16, "micro_batch": 8}
    shape |= {name: changes.pop(name) for name in list(changes) if name in shape}
    return ShardDataModule(DataConfig(path=str(path), **{"workers": 0, "window": 3, **changes}), **shape)


def batches_equal(one: Iterable[dict], other: Iterable[dict]) -> bool:
    tensors = ("images", "labels", "positions", "samples", "boxes")
    return all(
        a["keys"] == b["keys"] and all(torch.equal(a[name], b[name]) for name in tensors)
        for a, b in zip(one, other, strict=True)
    )


def test_batches_hold_images_with_their_keys_labels_and_positions(folder):
    data = module(folder)
    assert data.steps_per_epoch == 6 and len(data.train_index) == 103
    batches = list(data.train_loader(lambda: 0))
    assert len(batches) == len(data.train_loader(lambda: 0)) == 12
    for batch in batches:
        assert batch["images"].dtype == torch.uint8 and batch["images"].shape == (8, 3, 24, 32)
        assert all(batch[name].dtype == torch.int64 for name in ("labels", "positions", "samples"))
        for sample, key, label in zip(batch["samples"].tolist(), batch["keys"], batch["labels"].tolist(), strict=True):
            assert key == data.train_index.key(sample) and key.startswith(f"class{label}/")
    positions = torch.cat([batch["positions"] for batch in batches])
    assert positions.tolist() == list(range(96))
    assert len({key for batch in batches for key in batch["keys"]}) == 96


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
def test_workers_do_not_change_the_batches(folder):
    one = list(module(folder).train_loader(lambda: 0))
    for workers in (1, 2, 3, 4):
        several = module(folder, workers=workers).train_loader(lambda: 0)
        for _ in range(2):  # Workers stay alive from one epoch to the next.
            assert batches_equal(one, several)
    frozen = module(folder).evaluation_loader
    index = open_shards(folder, "val")
    again = module(folder, workers=2).evaluation_loader(index, 4)
    assert batches_equal(frozen(index, 4), again)


def test_loader_resumed_mid_epoch_gives_the_remaining_batches(folder):
    data = module(folder)
    whole = [list(data.train_loader(lambda step=step: step)) for step in (0, 6)]
    carried_on = list(data.train_loader(lambda: 8))
    assert len(carried_on) == 8 and batches_equal(carried_on, whole[1][4:])
    assert not batches_equal(whole[0][:1], whole[1][:1])


def test_ranks_and_micro_batches_do_not_change_images_or_crops(folder):
    def rows(ranks: int, micro_batch: int) -> dict:
        data = module(folder, micro_batch=micro_batch)
        loaders = [data.train_loader(lambda: 4, rank, ranks) for rank in range(ranks)]
        batches = [batch for loader in loaders for batch in loader]
        return {
            int(position): (image.numpy().tobytes(), key)
            for batch in batches
            for position, image, key in zip(batch["positions"], batch["images"], batch["keys"], strict=True)
        }

    one = rows(1, 16)
    assert len(one) == 32 and rows(2, 4) == one and rows(2, 8) == one and rows(1, 2) == one


def test_image_is_cropped_and_mirrored_differently_in_each_epoch(folder):
    data = module(folder, global_batch=8)
    seen: dict[str, set[bytes]] = {}
    for epoch in range(4):
        for batch in data.train_loader(lambda epoch=epoch: epoch * data.steps_per_epoch):
            for key, image in zip(batch["keys"], batch["images"], strict=True):
                seen.setdefault(key, set()).add(image.numpy().tobytes())
    assert sum(len(crops) for crops in seen.values()) == 4 * 96


def test_flip_mirrors_half_of_the_images(folder):
    mirrored = 0
    loaders = (module(folder, flip=flip).train_loader(lambda: 0) for flip in (True, False))
    for one, other in zip(*loaders, strict=True):
        for image, straight in zip(one["images"], other["images"], strict=True):
            assert torch.equal(image, straight) or torch.equal(image, straight.flip(-1))
            mirrored += not torch.equal(image, straight)
    assert 30 < mirrored < 66


def test_validation_loader_gives_each_sample_once_on_any_ranks(folder):
    data = module(folder)
    assert data.val_index is not None
    batches = list(data.val_dataloader())
    assert [key for batch in batches for key in batch["keys"]] == [data.val_index.key(i) for i in range(17)]
    assert all(torch.equal(batch["positions"], batch["samples"]) for batch in batches)
    assert max(len(batch["keys"]) for batch in batches) <= 8
    ranks = [
        [key for batch in data.evaluation_loader(data.val_index, 4, rank, 3) for key in batch["keys"]]
        for rank in range(3)
    ]
    assert sorted(key for keys in ranks for key in keys) == sorted(key for batch in batches for key in batch["keys"])
    assert batches_equal(batches, data.val_dataloader())


def test_loader_of_one_channel_gives_grey_images(folder):
    batch = next(iter(module(folder, channels=1, mean=[0.5], std=[0.2]).train_loader(lambda: 0)))
    assert batch["images"].shape == (8, 1, 24, 32)


def val_samples(data: ShardDataModule) -> int:
    assert data.val_index is not None
    return len(data.val_index)


def test_validation_data_are_found_from_the_paths(folder, tmp_path):
    assert val_samples(module(folder)) == 17
    assert module(folder / "train").val_index is None and module(folder / "train").val_dataloader() == []
    assert val_samples(module(folder / "train", val_path=str(folder))) == 17
    assert val_samples(module(folder / "train", val_path=str(folder / "val"))) == 17
    (tmp_path / "x").mkdir()
    os.symlink(folder / "train", tmp_path / "x" / "train")
    os.symlink(folder / "val", tmp_path / "x" / "test")
    assert val_samples(module(tmp_path / "x")) == 17


def test_data_identity_changes_with_the_order_settings_only(folder):
    identity = module(folder).identity
    assert identity == {
        "order_version": 1,
        "window": 3,
        "lanes": 1,
        "weights": None,
        "views_per_image": 1,
        "fingerprint": open_shards(folder, "train").fingerprint,
        "samples": 103,
    }
    for change in ({"window": 4}, {"lanes": 2}, {"views_per_image": 2}):
        assert module(folder, **change).identity != identity
    assert module(folder, workers=2, micro_batch=4).identity == identity


def test_fewer_samples_than_a_global_batch_raise_data_error(folder):
    with pytest.raises(DataError, match=r"103 training samples, fewer than global_batch=104.*at most 103"):
        module(folder, global_batch=104)
    assert module(folder, global_batch=103, micro_batch=103).steps_per_epoch == 1


def test_data_without_path_or_source_raises_data_error():
    with pytest.raises(DataError, match=r"neither data\.path nor data\.source is set"):
        ShardDataModule(DataConfig(), image_size=(32, 32), channels=3, seed=0, global_batch=8, micro_batch=8)


def test_channels_that_do_not_match_mean_and_std_raise_data_error(folder):
    with pytest.raises(DataError, match=r"model\.in_channels=1, but data\.mean and data\.std have 3 values"):
        module(folder, channels=1)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scale": (0.5, 0.2)}, "scale="),
        ({"scale": (0, 1)}, "scale="),
        ({"std": (1, 1)}, "mean has 3 channels and std 2"),
        ({"std": (1, 0, 1)}, "std="),
        ({"workers": -1}, "workers"),
        ({"window": 0}, "window"),
        ({"val_crop": 0}, "val_crop"),
        ({"pathh": "x"}, "pathh"),
        ({"source": "cats"}, "source"),
        ({"weights": [1.0]}, "weights="),
        ({"path": ["x", "y"], "weights": [1.0, 0.0]}, "weights="),
        ({"decode": "slow"}, "decode"),
        ({"bits": 12}, "bits"),
    ],
)
def test_invalid_data_setting_raises_validation_error(changes, says):
    with pytest.raises(ValidationError, match=says):
        DataConfig(**{"path": "x", **changes})


def test_loader_workers_survive_ctrl_c(folder):
    loader = module(folder, workers=1).train_loader(lambda: 0)
    batches = iter(loader)
    first = next(batches)
    for worker in loader._iterator._workers:  # type: ignore[union-attr]
        os.kill(worker.pid, signal.SIGINT)
    assert len(first["keys"]) == 8 and len(list(batches)) == 11


def test_real_photographs_keep_their_colours(real_images, tmp_path, monkeypatch):
    monkeypatch.setenv("MAE_CACHE", str(tmp_path))
    data = module(real_images / "grocery", image_size=(64, 64), val_crop=0.875)
    batch = next(iter(data.evaluation_loader(open_shards(real_images / "grocery", "val"), 32)))
    assert 60 < batch["images"].float().mean() < 180 and batch["images"].float().std() > 40
    assert batch["labels"].min() >= 0


def test_built_in_digits_load_as_train_and_validation_data(tmp_path):
    path = builtin.ensure("digits", tmp_path)
    config = DataConfig(source="digits", root=str(tmp_path), workers=0, mean=[0.5], std=[0.5])
    data = ShardDataModule(config, image_size=(32, 32), channels=1, seed=0, global_batch=128, micro_batch=64)
    assert data.steps_per_epoch == 11 and data.val_index is not None and len(data.val_index) == 359
    assert data.train_index.shards[0].startswith(path)
