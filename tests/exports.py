"""Small checkpoints to export, and a photograph to compare on."""

from pathlib import Path

import torch
from skimage.data import chelsea
from torch import Tensor
from torch.nn import functional as F

import mae

SMALL = {
    "image_size": 32,
    "patch_size": 8,
    "width": 64,
    "depth": 2,
    "num_heads": 4,
    "decoder_width": 32,
    "decoder_depth": 1,
    "decoder_num_heads": 4,
}


def own_checkpoint(tmp_path: Path, **fields) -> tuple[mae.MaskedAutoencoder, Path]:
    """A model with random weights everywhere, biases and norms too, and the file that a run would have saved of it."""
    torch.manual_seed(0)
    model = mae.MaskedAutoencoder(mae.MAEConfig(**SMALL | fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    recipe = {
        "model": model.config.model_dump(mode="json"),
        "data": {"mean": [0.3, 0.4, 0.5][: model.config.in_channels], "std": [0.2, 0.25, 0.3]},
    }
    if model.config.in_channels != 3:
        recipe["data"] = {"mean": [0.4] * model.config.in_channels, "std": [0.25] * model.config.in_channels}
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    path = tmp_path / "step-00000500.ckpt"
    torch.save({"mae": {"step": 500, "recipe": recipe}, "state_dict": state}, path)
    return model, path


def photograph(config: mae.MAEConfig, batch: int = 2) -> Tensor:
    """Crops of a cat, roughly normalised: float32 [B, C, H, W]."""
    pixels = torch.from_numpy(chelsea()).permute(2, 0, 1).float() / 127.5 - 1
    crops = torch.stack([pixels[:, 20 * i : 20 * i + 240, 60 * i : 60 * i + 240] for i in range(batch)])
    crops = F.interpolate(crops, config.image_size, mode="bilinear", antialias=True)
    return crops[:, [channel % 3 for channel in range(config.in_channels)]]
