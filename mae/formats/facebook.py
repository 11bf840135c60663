"""facebookresearch/mae `.pth` files: {"model": state dict} or the bare state dict. The key names are ours.

An export has `args` beside the model, as the published training checkpoints do, with what weights cannot say.
"""

from collections.abc import Iterator
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae.errors import CheckpointError
from mae.formats.format import Comparison, Export, Format, require
from mae.formats.timm import compare_with_timm
from mae.models.config import MAEConfig
from mae.models.vit import sincos_positions
from mae.run.checkpoint_files import read

# Heads leave no trace in the weights; these are the widths of the published models.
ENCODER_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1536: 24, 3072: 32}
DECODER_HEADS = {512: 16}
PROBE_HEAD = "head.0.running_mean"  # of a published linear probe: BatchNorm, then a linear layer


def has_decoder(state: dict[str, Tensor]) -> bool:
    """Returns whether the weights hold a whole autoencoder; published files for fine-tuning hold the encoder only."""
    return "decoder_pred.weight" in state


def infer_config(state: dict[str, Tensor], given: dict[str, Any]) -> MAEConfig:
    """Returns the architecture that a state dict shows; what it cannot show comes from `given` or from the paper.

    Raises CheckpointError if the weights are no MAE's, or heads or the image size cannot be told.
    """
    needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")
    if missing := [key for key in needed if key not in state]:
        raise CheckpointError(
            f"these are no masked-autoencoder weights: {', '.join(missing)} missing; the keys begin with "
            f"{', '.join(list(state)[:3])}"
        )
    width, in_channels, patch_size = state["patch_embed.proj.weight"].shape[:3]
    class_tokens = count_class_tokens(state)
    shown = {
        "width": width,
        "in_channels": in_channels,
        "patch_size": patch_size,
        "class_tokens": class_tokens,
        "depth": _count(state, "blocks"),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "num_heads": given.get("num_heads") or _heads("num_heads", width, ENCODER_HEADS),
        "image_size": given.get("image_size") or _image_size(state["pos_embed"], class_tokens, patch_size),
    }
    if has_decoder(state):
        decoder_width = state["decoder_pred.weight"].shape[1]
        shown |= {
            "decoder_width": decoder_width,
            "decoder_depth": _count(state, "decoder_blocks"),
            "decoder_num_heads": given.get("decoder_num_heads")
            or _heads("decoder_num_heads", decoder_width, DECODER_HEADS),
            "decoder": "cross" if "decoder_blocks.0.attn.kv.weight" in state else "self",
        }
    config = MAEConfig.model_validate(shown | given)
    fixed = sincos_positions(width, config.grid, class_tokens) if width % 4 == 0 else None
    learned = fixed is None or not torch.allclose(fixed, state["pos_embed"].float(), atol=1e-5)
    return config.model_copy(update={"positions": given.get("positions", "learned" if learned else "sincos")})


def count_class_tokens(state: dict[str, Tensor]) -> int:
    """Returns T, the number of class tokens that weights have."""
    return state["cls_token"].shape[1] if "cls_token" in state else 0


def _count(state: dict[str, Tensor], blocks: str) -> int:
    return len({key.split(".")[1] for key in state if key.startswith(f"{blocks}.")})


def _heads(setting: str, width: int, known: dict[int, int]) -> int:
    if width not in known:
        raise CheckpointError(
            f"the number of heads at width {width} cannot be told from weights: give {setting}= (model.{setting}= on a "
            "command line)"
        )
    return known[width]


def _image_size(positions: Tensor, class_tokens: int, patch_size: int) -> tuple[int, int]:
    """Returns the size that positions show: that of the grid whose sine-cosine table they are, else of a square."""
    patches = positions.shape[1] - class_tokens
    side = isqrt(patches)
    grid = _table_grid(positions, class_tokens) or (side, side)
    if grid[0] * grid[1] != patches:
        raise CheckpointError(
            f"{patches} positions are no square grid: give image_size=(height, width) "
            "(model.image_size=[height,width] on a command line)"
        )
    return grid[0] * patch_size, grid[1] * patch_size


def _table_grid(positions: Tensor, class_tokens: int) -> tuple[int, int] | None:
    """Returns the grid whose sine-cosine table the positions are; None if they are no such table."""
    patches, width = positions.shape[1] - class_tokens, positions.shape[2]
    for rows in (rows for rows in range(1, patches + 1) if patches % rows == 0 and width % 4 == 0):
        grid = rows, patches // rows
        if torch.allclose(sincos_positions(width, grid, class_tokens), positions.float(), atol=1e-5):
            return grid
    return None


def may_be_of(state: dict[str, Tensor], image_size: int | tuple[int, int] | None) -> bool:
    """Returns whether the positions may be those of images of this size, as far as they show it."""
    if image_size is None or not {"patch_embed.proj.weight", "pos_embed"} <= state.keys():
        return False
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    positions, class_tokens = state["pos_embed"], count_class_tokens(state)
    patch_size = state["patch_embed.proj.weight"].shape[2]
    grid = sides[0] // patch_size, sides[1] // patch_size
    if any(side % patch_size for side in sides) or grid[0] * grid[1] != positions.shape[1] - class_tokens:
        return False
    return _table_grid(positions, class_tokens) in (None, grid)


def plain_head(state: dict[str, Tensor], eps: float = 1e-6) -> dict[str, Tensor]:
    """Returns the weights of a published linear probe with a plain linear head, which gives the same scores.

    eps  of the BatchNorm without scale and shift (head.0) that precedes the linear layer (head.1)
    """
    mean, variance = state["head.0.running_mean"].double(), state["head.0.running_var"].double()
    weight = state["head.1.weight"].double() / (variance + eps).sqrt()
    others = {key: value for key, value in state.items() if not key.startswith("head.")}
    return others | {"head.weight": weight.float(), "head.bias": (state["head.1.bias"] - weight @ mean).float()}


def write(export: Export, file: Path) -> dict[str, Any]:
    config = export.encoder.config
    require(config, "facebookresearch/mae", "one class token", "square images", "three channels")
    state = export.encoder.state_dict()
    if has_decoder(state):
        require(config, "facebookresearch/mae", "a decoder of self-attention")
    # A plain dictionary: torch refuses a Namespace unless the reader allows it.
    said: dict[str, Any] = {"input_size": config.image_size[0], "num_heads": config.num_heads}
    if has_decoder(state):
        said |= {"norm_pix_loss": config.norm_pix, "mask_ratio": config.mask_ratio}
        said["decoder_num_heads"] = config.decoder_num_heads
    if export.weights:
        said["weights"] = export.weights
    torch.save({"model": dict(state), "args": said}, file)
    return {"class": "models_mae.MaskedAutoencoderViT" if has_decoder(state) else "models_vit.VisionTransformer"}


def compare(export: Export, file: Path, images: Tensor) -> Iterator[Comparison]:
    """Compares the encoder with timm's VisionTransformer, which it is: the published code is no package."""
    state = {key: value for key, value in read(file)["model"].items() if not in_decoder(key)}
    yield from compare_with_timm(export.encoder, state, images)


def in_decoder(key: str) -> bool:
    """Returns whether a parameter belongs to the decoder."""
    return key.startswith("decoder_") or key == "mask_token"


FORMAT = Format(
    sentence=".pth of facebookresearch/mae: encoder and decoder, the encoder alone, or a classifier",
    suffix=".pth",
    peer="timm",
    compared="the encoder's features of all tokens",
    write=write,
    compare=compare,
    holds="either",
    heads=True,
)
