"""lightly as an entry of benchmarks/ten_minutes.py: the parts of its documented MAE, with timm's Vision Transformer.

`own` are the settings of its published benchmark (benchmarks/imagenet/vitb16/mae.py, 100 epochs with batches of 256).
Its target is raw pixels; here it is normalised ones, as for all entries, because the loss is compared.
"""

from importlib.metadata import version
from pathlib import Path

import torch
from lightly.models import utils  # pyright: ignore[reportMissingImports]
from lightly.models.modules import (  # pyright: ignore[reportMissingImports]
    MaskedVisionTransformerDecoderTIMM,
    MaskedVisionTransformerTIMM,
)
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks.entries.plain_loop import MODEL, Recipe, run_entry
from mae.models.config import MAEConfig

BENCHMARK = Recipe(batch=256, base_lr=1.5e-4, betas=(0.9, 0.95), warmup=0.4, end=0.001)


class LightlyMAE(nn.Module):
    """MAE from lightly's building blocks; the loss is that of normalised pixels."""

    def __init__(self, config: MAEConfig = MODEL) -> None:
        super().__init__()
        self.config = config
        vit = VisionTransformer(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.num_heads,
            num_classes=0,
        )
        self.encoder = MaskedVisionTransformerTIMM(vit)
        self.embed = nn.Linear(config.width, config.decoder_width)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            config.patches, config.decoder_width, config.decoder_depth, config.decoder_num_heads
        )
        self.predict = nn.Linear(config.decoder_width, config.patch_values)

    @property
    def module(self) -> nn.Module:
        return self

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        keep, hidden = self.mask(images, noise)
        visible = self.embed(self.encoder.encode(images, idx_keep=keep))
        tokens = utils.repeat_token(self.decoder.mask_token, (len(images), self.config.patches + 1))
        tokens = utils.set_at_index(tokens.to(visible.dtype), keep, visible)
        pred = self.predict(utils.get_at_index(self.decoder(tokens), hidden))
        target = utils.get_at_index(utils.patchify(images, self.config.patch_size), hidden - 1)
        return nn.functional.mse_loss(pred.float(), utils.normalize_mean_var(target, dim=-1))

    loss = forward

    def mask(self, images: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the numbers of visible and of hidden tokens, of which 0 is the class token."""
        if noise is None:
            size = len(images), self.config.patches + 1
            return utils.random_token_mask(size, self.config.mask_ratio, device=images.device)
        order = nn.functional.pad(noise.argsort(dim=1) + 1, (1, 0))
        return order[:, : self.config.visible + 1], order[:, self.config.visible + 1 :]

    def features(self, images: Tensor) -> Tensor:
        return self.encoder.encode(images)[:, 1:].mean(dim=1)

    def load_ours(self, state: dict[str, Tensor]) -> None:
        """Takes the weights of a MaskedAutoencoder of the same size."""
        decoder = {key.removeprefix("decoder_"): value for key, value in state.items() if key.startswith("decoder_")}
        self.embed.load_state_dict({name: decoder.pop(f"embed.{name}") for name in ("weight", "bias")})
        self.predict.load_state_dict({name: decoder.pop(f"pred.{name}") for name in ("weight", "bias")})
        self.decoder.load_state_dict({"mask_token": state["mask_token"], **decoder})
        encoder = {key: value for key, value in state.items() if not key.startswith(("decoder_", "mask_token"))}
        self.encoder.vit.load_state_dict(encoder)

    def save(self, path: Path) -> None:
        """Writes the weights in the format of facebookresearch/mae, with the heads that they do not show."""
        state = dict(self.encoder.vit.state_dict())
        for prefix, part in (("embed.", self.embed), ("pred.", self.predict), ("", self.decoder)):
            state |= {f"decoder_{prefix}{key}": value for key, value in part.state_dict().items()}
        state["mask_token"] = state.pop("decoder_mask_token")
        said = {"input_size": self.config.image_size[0], "mask_ratio": self.config.mask_ratio, "norm_pix_loss": True}
        said |= {"num_heads": self.config.num_heads, "decoder_num_heads": self.config.decoder_num_heads}
        torch.save({"model": state, "args": said}, path)


if __name__ == "__main__":
    run_entry(LightlyMAE, BENCHMARK, version("lightly"))
