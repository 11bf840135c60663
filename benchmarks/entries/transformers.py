"""Hugging Face transformers as an entry of benchmarks/ten_minutes.py: ViTMAEForPreTraining.

`own` are the settings of the command that the documentation of examples/pytorch/image-pretraining/run_mae.py gives for
CIFAR-10, and what transformers.Trainer adds by default (betas, clipping). bf16 is its flag of that name.

A model that begins from random weights has zeros for the fixed positions of its decoder (transformers 5.24), so that
all hidden patches of an image get the same prediction. `--entries "transformers positions"` sets positions and mask
token as published.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining, __version__

from benchmarks.entries.plain_loop import MODEL, Recipe, run_entry
from mae.models.vit import sincos_positions

RUN_MAE = Recipe(batch=8, base_lr=1.5e-4, betas=(0.9, 0.999), warmup=0.05, clip=1.0)


class ViTMAE:
    """The model of cifar10_tiny as a ViTMAEForPreTraining.

    positions  set the decoder's positions and mask token as published; otherwise they are as the library begins
    """

    def __init__(self, positions: bool = False) -> None:
        self.module = ViTMAEForPreTraining(
            ViTMAEConfig(
                image_size=MODEL.image_size[0],
                patch_size=MODEL.patch_size,
                hidden_size=MODEL.width,
                num_hidden_layers=MODEL.depth,
                num_attention_heads=MODEL.num_heads,
                intermediate_size=4 * MODEL.width,
                decoder_hidden_size=MODEL.decoder_width,
                decoder_num_hidden_layers=MODEL.decoder_depth,
                decoder_num_attention_heads=MODEL.decoder_num_heads,
                decoder_intermediate_size=4 * MODEL.decoder_width,
                mask_ratio=MODEL.mask_ratio,
                norm_pix_loss=MODEL.norm_pix,
                layer_norm_eps=1e-6,  # as published; transformers has 1e-12 by default, which is another function
            )
        )
        if positions:
            decoder = self.module.decoder
            with torch.no_grad():
                decoder.decoder_pos_embed.copy_(sincos_positions(MODEL.decoder_width, MODEL.grid, 1))
                nn.init.normal_(decoder.mask_token, std=0.02)

    def loss(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.module(images, noise=noise).loss

    def features(self, images: Tensor) -> Tensor:
        self.module.config.mask_ratio = 0.0
        tokens = self.module.vit(images).last_hidden_state[:, 1:]  # in random order
        self.module.config.mask_ratio = MODEL.mask_ratio
        return tokens.mean(dim=1)

    def save(self, path: Path) -> None:
        self.module.save_pretrained(path)


if __name__ == "__main__":
    run_entry(ViTMAE, RUN_MAE, __version__, known=("positions",))
