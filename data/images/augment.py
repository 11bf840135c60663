"""RandAugment (timm), seeded by (seed, epoch, position)."""

import math
import random

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor


class RandAugment:
    """Random changes of colour and geometry, by a policy such as rand-m9-mstd0.5-inc1 (Cubuk et al. 2020).

    size  (height, width) of the images; translations reach 45 % of the shorter side
    mean  per channel, 0 … 1: the colour that fills in at the edges
    """

    def __init__(self, policy: str, size: tuple[int, int], mean: tuple[float, ...]):
        self.transform = rand_augment_transform(
            policy,
            {
                "translate_const": int(0.45 * min(size)),
                "img_mean": tuple(min(255, round(255 * value)) for value in mean),
                # At magnitude 10 timm's posterize keeps 0 bits, which Pillow refuses.
                "magnitude_max": math.nextafter(10, 0),
                "interpolation": Image.Resampling.BICUBIC,
            },
        )

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        """Augments an image, uint8 [3, H, W]. Seeds the generators of Python and numpy, from which timm draws."""
        random.seed(seed)
        np.random.seed(seed)
        changed = self.transform(Image.fromarray(rearrange(image, "c h w -> h w c").contiguous().numpy()))
        return rearrange(torch.from_numpy(np.array(changed)), "h w c -> c h w")
