"""What cannot be read is counted, named and replaced; nothing hangs, and too much of it ends the run."""

import io
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.datamodule import DataConfig, ShardDataModule
from data.errors import DataError
from data.images.crops import DRAWS, random_resized_crop
from data.images.decode import decode, read_header, verify
from data.index.build import build
from data.loader.faults import Faults
from data.loader.loader import explain_worker_death
from data.pack.image_folder import find_images
from data.pack.pack import pack


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """40 images in shards of 8."""
    (tmp_path / "in").mkdir()
    for i in range(40):
        Image.effect_noise((30, 30), 50).save(tmp_path / "in" / f"{i:02d}.png")
    samples, *_ = find_images(tmp_path / "in")
    pack(samples, tmp_path / "out", name="x", classes=[], shard_size=8)
    return tmp_path / "out"


def module(path: Path, *, bad_samples: Path | None = None, **changes) -> ShardDataModule:
    config = DataConfig(path=str(path), **{"workers": 0, "window": 2, **changes})
    shape = {"image_size": (16, 16), "channels": 3, "seed": 3, "global_batch": 8, "micro_batch": 4}
    return ShardDataModule(config, **shape, bad_samples=bad_samples)


def damage(data: ShardDataModule, *samples: int) -> None:
    for sample in samples:
        shard, offset, _ = data.train_index.locate(sample)
        with open(data.train_index.shards[shard], "r+b") as file:
            file.seek(offset)
            file.write(bytes(40))


def finished(loader) -> list[dict]:
    batches = list(loader)
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()
    return batches


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_sample_is_recorded_and_replaced_by_one_of_its_shard(shards, tmp_path, workers):
    data = module(shards, workers=workers, bad_samples=tmp_path / "bad.jsonl")
    before = finished(data.train_loader(lambda: 0))
    damage(data, 5, 6)
    after = finished(data.train_loader(lambda: 0))
    records = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert {record["key"] for record in records} == {data.train_index.key(5), data.train_index.key(6)}
    assert all(record["shard"].endswith("x-000000.tar") and "bytes are" in record["reason"] for record in records)
    for one, other in zip(before, after, strict=True):
        bad = (one["samples"] == 5) | (one["samples"] == 6)
        torch.testing.assert_close(one["images"][~bad], other["images"][~bad], rtol=0, atol=0)
        assert ((other["samples"][bad] < 8) & (other["samples"][bad] != 5) & (other["samples"][bad] != 6)).all()
    assert sum(len(batch["keys"]) for batch in after) == 40


def test_replacements_do_not_depend_on_ranks_workers_and_micro_batches(shards):
    damage(module(shards), *range(8, 16), 20, 21, 22, 23)  # a whole shard, and more than a micro-batch
    seen = []
    for ranks, workers in ((1, 0), (2, 2)):
        data = module(shards, workers=workers)
        loaders = [finished(data.train_loader(lambda: 0, rank, ranks)) for rank in range(ranks)]
        rows = [
            (int(position), int(sample), image.sum().item())
            for batches in loaders
            for batch in batches
            for position, sample, image in zip(batch["positions"], batch["samples"], batch["images"], strict=True)
        ]
        seen.append(sorted(rows))
    assert seen[0] == seen[1] and len(seen[0]) == 40
    assert not {sample for _, sample, _ in seen[0]} & {*range(8, 16), 20, 21, 22, 23}


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_loads_each_readable_sample_once_and_nothing_in_the_place_of_others(shards, workers):
    data = module(shards, workers=workers)
    index = data.train_index
    whole = {int(s): image.clone() for s, image in samples_of(data.evaluation_loader(index, 4, replace=False))}
    damage(data, *range(8, 16), 20, 22)  # whole batches, and parts of one
    for view in (None, 0):
        found = dict(samples_of(data.evaluation_loader(index, 4, view=view, replace=False)))
        assert [*found] == [sample for sample in range(40) if sample not in {*range(8, 16), 20, 22}]
        assert view is not None or all(torch.equal(whole[sample], image) for sample, image in found.items())


def samples_of(loader):
    """Yields number and image of each sample; their positions and keys agree."""
    for batch in loader:
        assert len(batch["images"]) == len(batch["labels"]) == len(batch["keys"])
        assert torch.equal(batch["samples"], batch["positions"])
        yield from zip(batch["samples"].tolist(), batch["images"].clone(), strict=True)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["removed", "cut short"])
def test_samples_of_a_shard_lost_while_in_use_are_replaced(shards, tmp_path, workers, how):
    data = module(shards, workers=workers, bad_samples=tmp_path / "bad.jsonl")
    if how == "removed":
        (shards / "x-000001.tar").unlink()
    else:
        os.truncate(shards / "x-000001.tar", 700)
    batches = finished(data.train_loader(lambda: 0))
    assert not {int(sample) for batch in batches for sample in batch["samples"]} & set(range(9, 16))
    reasons = {json.loads(line)["reason"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()}
    assert all(("cannot be opened" if how == "removed" else "ends before byte") in reason for reason in reasons)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_that_can_read_no_sample_raises_data_error(shards, workers):
    data = module(shards, workers=workers)
    damage(data, *range(40))
    loader = data.train_loader(lambda: 0)
    with pytest.raises(DataError, match=r"neither the sample .* can be read; the last is \d+ of .*x-00000\d.tar: its"):
        next(iter(loader))
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()  # type: ignore[attr-defined]


def test_bad_samples_above_the_fraction_raise_data_error_with_their_list(tmp_path):
    record = {"shard": "a.tar", "key": "k", "reason": "its bytes are damaged", "epoch": 0, "position": 1}
    faults = Faults(tmp_path / "bad.jsonl", fraction=1e-3)
    faults.note(500, [record, record])  # too early to judge
    faults.note(5500, [record] * 3)
    assert faults.bad == 5
    with pytest.raises(
        DataError,
        match=r"7 of 6001 samples .*max_bad_fraction=0.001.*a.tar, k: its bytes are damaged[.;].*raise data.max",
    ):
        faults.note(1, [record, record])
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 7


def test_killed_worker_raises_data_error_with_its_sample(shards):
    loader = module(shards, workers=1).train_loader(lambda: 0)
    batches = iter(loader)
    next(batches)
    says = r"worker died \((killed by signal: Killed|exited unexpectedly)\) while it read .*x-00000\d.tar, sample"
    with pytest.raises(DataError, match=says), explain_worker_death():  # torch raises wherever the trainer is just then
        os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)  # type: ignore[union-attr]
        for _ in range(20):
            next(batches)


@pytest.mark.parametrize("number_of_each", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_images_and_tars_raise_nothing_but_data_error(tmp_path, number_of_each):
    """JPEGs and tars with flipped bits, cut short, with wrong lengths and absurd sizes."""
    noise = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.effect_noise((120, 90), 60).convert("RGB").resize((200, 150)).save(buffer, "JPEG", quality=85)
    image = buffer.getvalue()
    (tmp_path / "in").mkdir()
    for i in range(6):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(image)
    samples, *_ = find_images(tmp_path / "in")
    pack(samples, tmp_path / "out", name="x", classes=[])
    tar = (tmp_path / "out" / "x-000000.tar").read_bytes()
    refused = {"image": 0, "tar": 0}
    for number in range(number_of_each):
        data = damaged(image, noise, number)
        try:
            header = read_header(data)
            box = random_resized_crop(header.height, header.width, noise.random(DRAWS).tolist())
            decode(data, header, [box], (32, 32), exact=False)
            verify(data)
        except DataError:
            refused["image"] += 1
        path = tmp_path / "broken.tar"
        path.write_bytes(damaged(tar, noise, number, header_size=600))
        try:
            build(str(path))
        except DataError:
            refused["tar"] += 1
    assert min(refused.values()) > 0.3 * number_of_each


def damaged(data: bytes, noise: np.random.Generator, number: int, header_size: int = 700) -> bytes:
    broken = bytearray(data)
    kind = number % 5
    if kind == 0:
        return bytes(broken[: noise.integers(len(data))])
    if kind == 1:  # flipped bits anywhere
        for at in noise.integers(len(data), size=20):
            broken[at] ^= 1 << int(noise.integers(8))
    elif kind == 2:  # in the header, where lengths and names are
        for at in noise.integers(header_size, size=4):
            broken[at] = int(noise.integers(256))
    elif kind == 3:  # an absurd size of the image, an absurd length of the member
        at = max(data.find(b"\xff\xc0") + 5, 124)
        broken[at : at + 4] = b"\xff\xff\xff\xff"
    else:  # bytes missing in the middle
        at = int(noise.integers(len(data)))
        del broken[at : at + int(noise.integers(1, 600))]
    return bytes(broken)


def test_member_names_outside_the_folder_are_keys_and_write_nothing(tmp_path):
    """A key is never used as a path: a tar with such names is read, and nothing is written outside."""
    import tarfile

    buffer = io.BytesIO()
    Image.new("RGB", (20, 20)).save(buffer, "PNG")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("../../evil.png", "/etc/evil2.png"):
            info = tarfile.TarInfo(name)
            info.size = len(buffer.getvalue())
            tar.addfile(info, io.BytesIO(buffer.getvalue()))
    data = ShardDataModule(
        DataConfig(path=str(tmp_path / "x.tar"), workers=0),
        image_size=(16, 16),
        channels=3,
        seed=0,
        global_batch=2,
        micro_batch=2,
    )
    keys = next(iter(data.train_loader(lambda: 0)))["keys"]
    assert sorted(key.rpartition("/")[2] for key in keys) == ["evil", "evil2"]
    assert not (tmp_path.parent.parent / "evil.png").exists()
