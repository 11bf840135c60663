"""segment-anything `.pth` files: a whole SAM, its `image_encoder.*` part, or the encoder's bare weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae.errors import CheckpointError
from mae.formats.format import Comparison, Export, Format, refuse_other_keys, require
from mae.formats.sam_names import PARTS, example_prompts, to_segment_anything
from mae.models.vit import LayerNorm
from mae.run.checkpoint_files import read
from mae.sam.encoder import SamConfig
from mae.sam.segmenter import Segmenter

PREFIX = "image_encoder."


def encoder_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the image encoder's weights under its own names, from those of a whole SAM or of the encoder.

    Raises CheckpointError if a whole model has a key that belongs to no part of a SAM.
    """
    if not any(key.startswith(PREFIX) for key in state):
        return state
    unknown = [key for key in state if not key.startswith((PREFIX, *PARTS))]
    if unknown:
        raise CheckpointError(f"these keys belong to no part of a SAM: {', '.join(unknown[:8])}")
    return {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}


def infer_config(state: dict[str, Tensor], given: dict[str, Any]) -> SamConfig:
    """Returns the architecture that the weights show: heads, window and global blocks from the relative positions.

    Raises CheckpointError if the weights are no SAM-style encoder's, or window and image are of one size, so that
    nothing tells a global block from a windowed one.
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


def write(export: Export, file: Path) -> dict[str, Any]:
    """Writes the encoder as `image_encoder.*`, with the other parts of a whole SAM; with `merge_into`, in the place of
    that SAM's encoder.
    """
    arguments = peer_arguments(export.sam.config)
    state = {PREFIX + key: value for key, value in export.sam.state_dict().items()}
    if export.segmenter is not None:
        state |= to_segment_anything(export.segmenter.other_parts())
    if export.merge_into is not None:
        state = replace_encoder(read(export.merge_into), state, PREFIX, export.merge_into)
    torch.save(state, file)
    return {
        "class": "segment_anything.modeling.ImageEncoderViT",
        "whole": export.segmenter is not None or export.merge_into is not None,
        "arguments": arguments | {"norm_layer": "functools.partial(torch.nn.LayerNorm, eps=1e-6)"},
        "merged_into": export.merge_into and str(export.merge_into),
    }


def compare(export: Export, file: Path, images: Tensor) -> Iterator[Comparison]:
    peer = peer_encoder(peer_arguments(export.sam.config))
    contents = read(file)
    problems = peer.load_state_dict(encoder_weights(contents), strict=False)
    refuse_other_keys("segment-anything", problems.missing_keys, problems.unexpected_keys)
    embedding = export.sam(images)
    yield Comparison(peer.eval()(images), embedding)
    if export.segmenter is not None and export.merge_into is None:
        yield from _masks(export.segmenter, contents, embedding)


def _masks(model: Segmenter, contents: dict[str, Any], embedding: Tensor) -> Iterator[Comparison]:
    """Compares the masks for a point and for a box on one image."""
    sam = peer_sam(model.encoder.config)
    problems = sam.load_state_dict(contents, strict=False)
    refuse_other_keys("segment-anything", problems.missing_keys, problems.unexpected_keys)
    places, row = sam.prompt_encoder.get_dense_pe(), torch.zeros(1, dtype=torch.long)
    point, box = example_prompts(model.encoder.config.image_size[0])
    for prompts, asked in ((point, ((point.points, point.labels), None)), (box, (None, box.boxes))):
        logits, _ = sam.mask_decoder(embedding, places, *sam.prompt_encoder(*asked, None), multimask_output=True)
        yield Comparison(logits, model.answer(embedding, row, prompts, several=True).logits)


def peer_arguments(config: SamConfig) -> dict[str, Any]:
    """Returns arguments of segment-anything's ImageEncoderViT that give our architecture.

    Raises ConfigError if images are not square, which that class cannot be.
    """
    require(config, "segment-anything", "square images")
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


def peer_encoder(arguments: dict[str, Any]) -> Any:
    """Builds segment-anything's own encoder, of random weights, with the epsilon of its published models."""
    from segment_anything.modeling import ImageEncoderViT

    return ImageEncoderViT(**arguments, norm_layer=LayerNorm)


def peer_sam(config: SamConfig) -> Any:
    """Builds segment-anything's whole SAM round such an encoder, of random weights."""
    from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    width = config.out_channels
    transformer = TwoWayTransformer(depth=2, embedding_dim=width, mlp_dim=8 * width, num_heads=8)
    return Sam(
        peer_encoder(peer_arguments(config)),
        PromptEncoder(width, config.grid, config.image_size, mask_in_chans=16),
        MaskDecoder(transformer_dim=width, transformer=transformer, iou_head_hidden_dim=width),
    ).eval()


def replace_encoder(whole: dict[str, Any], ours: dict[str, Tensor], prefix: str, path: Path) -> dict[str, Tensor]:
    """Returns the weights of a whole SAM with its encoder (all keys with `prefix`) replaced.

    Raises CheckpointError naming what differs if its encoder is of another architecture.
    """
    theirs = {key for key in whole if key.startswith(prefix)}
    differing = theirs ^ ours.keys() | {key for key in theirs & ours.keys() if whole[key].shape != ours[key].shape}
    if differing:
        raise CheckpointError(
            f"{path} has an image encoder of another architecture: {', '.join(sorted(differing)[:8])}"
        )
    return whole | ours


FORMAT = Format(
    sentence=".pth of segment-anything: a SAM-style encoder, or a whole SAM (of one, or with --merge-into SAM.pth)",
    suffix=".pth",
    peer="segment_anything",
    compared="image embeddings (and masks of a whole SAM)",
    write=write,
    compare=compare,
    holds="sam",
    merges=True,
)
