"""Maps over tokens, laid over the image that they belong to."""

from pathlib import Path

import matplotlib
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mae.sam.relevance import BlockMaps

STRENGTH = 0.6  # of the colours at the highest relevance


def overlay(image: Tensor, relevance: Tensor) -> Image.Image:
    """The image with a map over it: from nothing at the lowest value to bright colours at the highest.

    image      [3, H, W]  in [0, 1]
    relevance  [h, w]     any scale; brought to the size of the image bilinearly
    """
    levels = F.interpolate(relevance.float()[None, None], image.shape[-2:], mode="bilinear", align_corners=False)[0, 0]
    # A handful of tokens may draw most of the attention: the map is cut at its 99th percentile.
    low, high = levels.min(), levels.flatten().kthvalue(max(1, int(levels.numel() * 0.99))).values
    levels = ((levels - low) / (high - low).clamp(min=torch.finfo(levels.dtype).tiny)).clamp(0, 1).cpu()
    colours = torch.from_numpy(matplotlib.colormaps["turbo"](levels.numpy())[..., :3]).float()
    strength = STRENGTH * levels[..., None]
    picture = (1 - strength) * rearrange(image.float().cpu(), "c h w -> h w c") + strength * colours
    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().numpy())


def save_overlays(folder: Path, image: Tensor, maps: BlockMaps, number: int = 0) -> list[Path]:
    """block-00-mean.png and block-00-rollout.png for every block, of image `number` of the batch.

    image  [3, H, W]  in [0, 1]
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for kind, blocks in (("mean", maps.mean[number]), ("rollout", maps.rollout[number])):
        for block, relevance in enumerate(blocks):
            paths.append(folder / f"block-{block:02d}-{kind}.png")
            overlay(image, relevance).save(paths[-1])
    return sorted(paths)
