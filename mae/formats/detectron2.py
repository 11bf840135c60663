"""detectron2's ViTDet `.pth` files: the backbone, `ViT` inside `SimpleFeaturePyramid`, for its checkpointer."""

from pathlib import Path
from typing import Any

import torch

from mae.errors import CheckpointError
from mae.formats.format import Export, Format, refuse_other_keys, require
from mae.models.config import MAEConfig

PREFIX = "backbone.net."


def parameter_shapes(config: MAEConfig) -> dict[str, tuple[int, ...]]:
    """Returns the parameters of detectron2's `ViT` by name, without relative positions, which start from zero."""
    width, hidden = config.width, int(config.width * config.mlp_ratio)
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, config.patches + (config.class_tokens == 1), width),
        "patch_embed.proj.weight": (width, config.in_channels, config.patch_size, config.patch_size),
        "patch_embed.proj.bias": (width,),
    }
    linear = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (hidden, width)}
    linear["mlp.fc2"] = (width, hidden)
    for block in range(config.depth):
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{block}.{norm}.{kind}": (width,) for kind in ("weight", "bias")}
        for name, shape in linear.items():
            shapes |= {f"blocks.{block}.{name}.weight": shape, f"blocks.{block}.{name}.bias": shape[:1]}
    return shapes


def write(export: Export, file: Path) -> dict[str, Any]:
    """Writes the encoder without class tokens and final norm, which ViTDet does not have.

    The row of one class token's position stays: the backbone drops it by `pretrain_use_cls_token`, and resizes the
    rest to the image. Those of several are left out, for it knows one.
    """
    config = export.encoder.config
    require(config, "detectron2's ViT", "square images")
    state = export.encoder.state_dict()
    left_out = [key for key in state if key.startswith(("cls_token", "norm.", "fc_norm.", "head."))]
    state = {key: value for key, value in state.items() if key not in left_out}
    if config.class_tokens > 1:
        state["pos_embed"] = state["pos_embed"][:, config.class_tokens :]
    wanted = parameter_shapes(config)
    refuse_other_keys("detectron2", wanted.keys() - state.keys(), state.keys() - wanted.keys())
    if differing := [key for key, shape in wanted.items() if state[key].shape != shape]:
        raise CheckpointError(f"detectron2 has other shapes for {', '.join(differing[:8])}")
    torch.save({"model": {f"{PREFIX}{key}": value for key, value in state.items()}}, file)
    return {
        "class": "detectron2.modeling.ViT",
        "arguments": {
            "patch_size": config.patch_size,
            "in_chans": config.in_channels,
            "embed_dim": config.width,
            "depth": config.depth,
            "num_heads": config.num_heads,
            "mlp_ratio": config.mlp_ratio,
            "qkv_bias": True,
            "norm_layer": "functools.partial(torch.nn.LayerNorm, eps=1e-6)",
            "pretrain_img_size": config.image_size[0],
            "pretrain_use_cls_token": config.class_tokens == 1,
        },
        "left_out": left_out,
    }


FORMAT = Format(
    sentence=".pth for the ViTDet backbone of detectron2: the encoder without class token and final norm",
    suffix=".pth",
    peer="detectron2",
    write=write,
    read_back=False,
)
