"""RandAugment of timm, drawn from the sample's place alone."""

import math
import random

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor


class RandAugment:
    """Changes of colour and geometry that a policy such as rand-m9-mstd0.5-inc1 chooses from (Cubuk et al. 2020).

    size  (height, width) of the images, of whose shorter side a translation goes as far as 45 %
    mean  per channel in units of 1, the colour of what comes into the picture at the edges
    """

    def __init__(self, policy: str, size: tuple[int, int], mean: tuple[float, ...]):
        self.transform = rand_augment_transform(
            policy,
            {
                "translate_const": int(0.45 * min(size)),
                "img_mean": tuple(min(255, round(255 * value)) for value in mean),
                # At 10 itself timm's posterize keeps 0 bits, which Pillow refuses.
                "magnitude_max": math.nextafter(10, 0),
                "interpolation": Image.Resampling.BICUBIC,
            },
        )

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        """uint8 [3, H, W] -> the same. timm draws from Python's and numpy's generators, which are seeded for it."""
        random.seed(seed)
        np.random.seed(seed)
        changed = self.transform(Image.fromarray(rearrange(image, "c h w -> h w c").contiguous().numpy()))
        return rearrange(torch.from_numpy(np.array(changed)), "h w c -> c h w")
