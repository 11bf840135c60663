"""segment-anything `.pth` files: a whole SAM, its `image_encoder.*` part, or the encoder's bare weights."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mae.checkpoint import read
from mae.errors import CheckpointError
from mae.models.sam import SamConfig, SamEncoder
from mae.models.vit import LayerNorm

PREFIX = "image_encoder."
OTHER_PARTS = ("prompt_encoder.", "mask_decoder.")
TOLERANCE = 1e-4


def encoder_weights(contents: dict[str, Any]) -> dict[str, Tensor]:
    """The image encoder's weights among the contents of a file, under its own names.

    Raises CheckpointError when a whole model has a key that belongs to no part of a SAM.
    """
    state = {
        key.removeprefix("module.").replace("_orig_mod.", ""): v for key, v in contents.get("model", contents).items()
    }
    if not any(key.startswith(PREFIX) for key in state):
        return state
    unknown = [key for key in state if not key.startswith((PREFIX, *OTHER_PARTS))]
    if unknown:
        raise CheckpointError(f"these keys belong to no part of a SAM: {', '.join(unknown[:8])}")
    return {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}


def infer_config(state: dict[str, Tensor], given: dict[str, Any]) -> SamConfig:
    """The architecture that the weights show: heads, window and global blocks from the lengths of relative positions.

    Raises CheckpointError for weights that are no SAM-style encoder, and when window and image are of one size, so
    that nothing tells a global block from a windowed one.
    """
    wanted = ("pos_embed", "patch_embed.proj.weight", "blocks.0.attn.rel_pos_h", "neck.0.weight")
    missing = [key for key in wanted if key not in state]
    if missing:
        raise CheckpointError(
            f"these are no weights of a SAM-style encoder: {', '.join(missing)} missing; the keys begin with "
            f"{', '.join(list(state)[:3])}"
        )
    width, in_channels, patch_size, _ = state["patch_embed.proj.weight"].shape
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    _, h, w, _ = state["pos_embed"].shape
    shown = {
        "image_size": (h * patch_size, w * patch_size),
        "patch_size": patch_size,
        "in_channels": in_channels,
        "width": width,
        "depth": depth,
        "num_heads": width // state["blocks.0.attn.rel_pos_h"].shape[1],
        "mlp_ratio": state["blocks.0.mlp.lin1.weight"].shape[0] / width,
        "out_channels": state["neck.0.weight"].shape[0],
    }
    return SamConfig.model_validate(
        shown | ({} if "global_blocks" in given else _windows(state, depth, (h, w))) | given
    )


def _windows(state: dict[str, Tensor], depth: int, grid: tuple[int, int]) -> dict[str, Any]:
    sizes = [
        tuple((state[f"blocks.{block}.attn.rel_pos_{side}"].shape[0] + 1) // 2 for side in "hw")
        for block in range(depth)
    ]
    windows = {size for size in sizes if size != grid}
    if not windows and grid[0] == grid[1]:
        raise CheckpointError(
            f"every block has relative positions for a grid of {grid[0]} x {grid[1]}, the whole image: global and "
            "windowed blocks cannot be told apart. Give global_blocks= (and window=)"
        )
    if len(windows) > 1 or any(h != w for h, w in windows):
        raise CheckpointError(f"the windows of the blocks are of several sizes or not square: {sorted(windows)}")
    global_blocks = tuple(block for block, size in enumerate(sizes) if size == grid)
    return {"global_blocks": global_blocks} | ({"window": next(iter(windows))[0]} if windows else {})


def write(encoder: SamEncoder, out: Path, whole: Path | None = None) -> dict[str, Any]:
    """Writes the encoder as `image_encoder.*`, loads it back through segment-anything, and compares the embeddings.

    whole    a SAM checkpoint of the same size into which the encoder is merged; prompt encoder and mask decoder stay
    returns  what the card says of the format: constructor arguments and the largest difference

    Raises CheckpointError, and leaves no file, when the encoder does not fit or is not the same function.
    """
    state = {PREFIX + key: value.contiguous() for key, value in encoder.state_dict().items()}
    if whole is not None:
        state = _merge(state, read(whole), whole)
    arguments = peer_arguments(encoder.config)
    installed = find_spec("segment_anything") is not None
    peer = peer_encoder(arguments) if installed else SamEncoder(encoder.config)
    temporary = out.with_name(out.name + ".tmp")
    try:
        torch.save(state, temporary)
        difference = _compare(encoder, encoder_weights(read(temporary)), peer)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    return {
        "class": "segment_anything.modeling.ImageEncoderViT",
        "arguments": arguments,
        "norm_layer": "torch.nn.LayerNorm with eps=1e-6",
        "merged_into": None if whole is None else str(whole),
        "compared_with": "segment-anything" if installed else "this framework, for segment-anything is not installed",
        "difference": difference,
    }


def peer_arguments(config: SamConfig) -> dict[str, Any]:
    """Arguments of segment-anything's ImageEncoderViT that give our architecture.

    Raises CheckpointError for a rectangle, which that class does not know.
    """
    if config.image_size[0] != config.image_size[1]:
        raise CheckpointError(f"segment-anything has square images only, and the encoder is for {config.image_size}")
    return {
        "img_size": config.image_size[0],
        "patch_size": config.patch_size,
        "in_chans": config.in_channels,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "out_chans": config.out_channels,
        "use_rel_pos": True,
        "window_size": config.window,
        "global_attn_indexes": list(config.global_blocks),
    }


def peer_encoder(arguments: dict[str, Any]) -> nn.Module:
    """segment-anything's own encoder, of random weights, with the epsilon that its published models have."""
    from segment_anything.modeling import ImageEncoderViT

    return ImageEncoderViT(**arguments, norm_layer=LayerNorm)


def _merge(ours: dict[str, Tensor], contents: dict[str, Any], path: Path) -> dict[str, Tensor]:
    theirs = {key for key in contents if key.startswith(PREFIX)}
    differing = [
        *(theirs ^ ours.keys()),
        *(key for key in theirs & ours.keys() if contents[key].shape != ours[key].shape),
    ]
    if differing:
        raise CheckpointError(
            f"{path} has an image encoder of another architecture: {', '.join(sorted(differing)[:8])}"
        )
    return contents | ours


@torch.inference_mode()
def _compare(encoder: SamEncoder, state: dict[str, Tensor], peer: nn.Module) -> float:
    """Largest difference of the image embeddings, relative to their largest value."""
    problems = peer.load_state_dict(state, strict=False)
    if problems.missing_keys or problems.unexpected_keys:
        raise CheckpointError(
            f"segment-anything's encoder and ours do not have the same keys: missing {problems.missing_keys}, "
            f"left over {problems.unexpected_keys}"
        )
    images = torch.randn(1, encoder.config.in_channels, *encoder.config.image_size, generator=torch.manual_seed(0))
    ours = encoder.eval()(images)
    difference = ((peer.eval()(images) - ours).abs().max() / ours.abs().max()).item()
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"segment-anything's embeddings differ from ours by {difference:.1e} of their largest value, more than "
            f"{TOLERANCE:.0e}"
        )
    return difference
