"""Clicks help: a SAM that has learned a few photographs by heart finds more of an object with each further click."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.index.index import open_shards
from data.loader.mask_dataset import Frame, MaskDataset
from data.order.samplers import MicroBatch
from mae.models.pixels import Pixels
from mae.sam.encoder import SamConfig, SamEncoder
from mae.sam.scores import score
from mae.sam.segmenter import Segmenter
from mae.sam.session import draw_session, simulate_session
from mae.sam.square_frame import blank_padding

PHOTOGRAPHS, SMALLEST = 4, 0.03  # of objects that all cover such a share of the photograph
STEPS = 300
PIXELS = Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CONFIG = SamConfig(image_size=128, width=48, depth=2, num_heads=3, window=8, global_blocks=(0, 1), out_channels=32)


def batch_of(dataset: MaskDataset, *samples: int) -> dict[str, Any]:
    batch = dataset[MicroBatch(0, np.array(samples), np.array(samples))]
    return {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in batch.items()}


def choose_photographs(whole: MaskDataset) -> list[int]:
    """Returns the first photographs of at least two objects, all of them large."""
    chosen: list[int] = []
    for sample in range(len(whole.index)):
        masks = batch_of(whole, sample)["masks"]
        if len(masks) > 1 and masks.areas.min() > SMALLEST * masks.size[0] * masks.size[1]:
            chosen.append(sample)
        if len(chosen) == PHOTOGRAPHS:
            break
    return chosen


def overfit(batch: dict[str, Any], clicks: int) -> Segmenter:
    """Trains a narrow SAM on one batch by sessions of so many further clicks."""
    torch.manual_seed(0)
    model = Segmenter(SamEncoder(CONFIG))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images = blank_padding(PIXELS.normalise(batch["images"]), batch["inside"])
    for step in range(STEPS):
        drawn = draw_session(len(batch["masks"]), clicks, True, torch.Generator().manual_seed(step))
        session = simulate_session(model, model(images), batch["masks"], batch["rows"], drawn, box_share=0.25)
        optimizer.zero_grad()
        session.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@pytest.mark.slow
def test_iou_rises_with_clicks_if_sessions_had_further_clicks(real_images: Path) -> None:
    index = open_shards(str(real_images / "coco_sa1b"), "train")
    whole = MaskDataset(index, Frame(CONFIG.image_size[0], None))
    chosen = choose_photographs(whole)
    batch = batch_of(MaskDataset(index, Frame(CONFIG.image_size[0], 8)), *chosen)
    models = {f"{clicks} clicks": overfit(batch, clicks) for clicks in (4, 0)}

    photographs = [batch_of(whole, sample) for sample in chosen]
    scores = score(models, photographs, PIXELS.normalise, [1, 3, 5], torch.device("cpu"))

    one, three, five = scores["4 clicks"]["clicks"].values()
    assert one + 0.02 < three and three + 0.01 < five, scores
    one, _, five = scores["0 clicks"]["clicks"].values()
    assert five < one, scores  # the recipe that had no further clicks: answers to them are not learned
