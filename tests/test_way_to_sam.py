"""docs/way-to-sam.md from its first command to its last, at toy size, every training killed and resumed."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from mae.formats.segment_anything import peer_sam
from mae.run.checkpoint_files import newest_valid
from mae.sam.encoder import SamConfig
from tests.conftest import ROOT
from tests.documentation import commands, python_blocks
from tests.masked_photos import shapes, write_coco
from tests.processes import assert_same_run, kill, run, start, wait_for_checkpoint
from tests.test_documented_commands import reduced

PAGE = ROOT / "docs" / "way-to-sam.md"
STEPS = 24
LONGER = [f"max_steps={STEPS}", "val_every=null", "log_every=1", "checkpoint.every_steps=4"]
SAME_MASKS = "\nassert masks.shape == same_masks.shape and (masks != same_masks.numpy()).mean() < 1e-3\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with photographs, photographs with masks, and a SAM of random weights."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("train.py", "eval.py", "conf"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "PHOTOS").mkdir()
    for number, image in enumerate(load_sample_images().images):
        for crop in range(60):
            pixels = image[crop * 4 : crop * 4 + 160, crop * 7 : crop * 7 + 160]
            Image.fromarray(pixels).save(folder / "PHOTOS" / f"{number}-{crop}.jpg")
    for part in ("train2017", "val2017"):
        write_coco(folder / "COCO" / part, folder / "COCO" / "annotations" / f"instances_{part}.json", 12)
    config = SamConfig(image_size=64, width=48, depth=2, num_heads=3, window=2, global_blocks=(1,), out_channels=32)
    torch.manual_seed(0)
    torch.save(peer_sam(config).state_dict(), folder / "sam_vit_h.pth")
    Image.fromarray(shapes(0)[0].astype(np.uint8)).save(folder / "PHOTO.jpg")
    return folder


def name_of(words: list[str]) -> str:
    return next(word.removeprefix("name=") for word in words if word.startswith("name="))


@pytest.mark.slow
def test_way_to_sam_runs_at_toy_size_and_each_killed_stage_ends_bit_equal(checkout: Path, tmp_path: Path) -> None:
    killed = Path(shutil.copytree(checkout, tmp_path / "killed", symlinks=True))
    trained = []
    for command in commands(PAGE):
        if command.needs not in ("", "that SAM"):
            continue
        _, *words = command.words
        if words[0] != "train.py":
            for folder in (checkout, killed):
                run([sys.executable, *reduced(words, folder)], folder=folder)
            continue
        words = [sys.executable, *reduced(words, checkout), *LONGER]
        name = name_of(words)
        # The student in SAM style and the SAM that it becomes agree.
        same_blocks = ["task.global_blocks=[1]"]
        own = {"small_sam": ["model.patch_size=16"], "sam_frozen": same_blocks, "sam_small": same_blocks}
        words += own.get(name, [])
        run(words, folder=checkout)
        process = start(words, killed)
        wait_for_checkpoint(process, killed / "runs" / name)
        kill(process)
        newest = newest_valid(killed / "runs" / name)
        assert newest is not None and newest.stem < f"step-{STEPS:08d}", f"{name} was not killed in time"
        said = run(words, folder=killed)
        assert f"resumed at step {int(newest.stem.removeprefix('step-'))}" in said
        assert_same_run(checkout / "runs" / name, killed / "runs" / name)
        trained.append(name)
    assert trained == ["at224", "at448", "at1024", "small", "small_sam", "sam", "sam_frozen", "sam_small"]
    (block,) = python_blocks(PAGE)
    (checkout / "use.py").write_text(block + SAME_MASKS)
    run([sys.executable, "use.py"], folder=checkout)
    assert len(list((checkout / "runs" / "sam" / "eval" / "segment_masks" / "box").glob("*.json"))) == 11
