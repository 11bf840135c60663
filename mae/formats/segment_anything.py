"""segment-anything `.pth` files: a whole SAM, its `image_encoder.*` part, or the encoder's bare weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae.errors import CheckpointError
from mae.formats.format import Comparison, Export, Format, refuse_other_keys, require
from mae.formats.sam_names import SEGMENT_ANYTHING_ENCODER, example_prompts, to_segment_anything
from mae.models.vit import LayerNorm
from mae.run.checkpoint_files import read
from mae.sam.encoder import SamConfig
from mae.sam.segmenter import Segmenter


def infer_config(state: dict[str, Tensor], given: dict[str, Any], like: SamConfig | None = None) -> SamConfig:
    """Returns the architecture that the weights show: heads, window and global blocks from the relative positions.

    like  an architecture whose windows are taken where the image is one window, so that nothing tells a global block
          from a windowed one; without it all blocks are global, which is the same function

    Raises CheckpointError if the weights are no SAM-style encoder's.
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
    if "global_blocks" not in given:
        shown |= _windows(state, depth, (h, w), like)
    return SamConfig.model_validate(shown | given)


def _windows(state: dict[str, Tensor], depth: int, grid: tuple[int, int], like: SamConfig | None) -> dict[str, Any]:
    sizes = [
        tuple((state[f"blocks.{block}.attn.rel_pos_{side}"].shape[0] + 1) // 2 for side in "hw")
        for block in range(depth)
    ]
    windows = {size for size in sizes if size != grid}
    if not windows and like is not None and (like.depth, like.grid) == (depth, grid):
        return {"global_blocks": like.global_blocks, "window": like.window}
    if len(windows) > 1 or any(h != w for h, w in windows):
        raise CheckpointError(f"the windows of the blocks are of several sizes or not square: {sorted(windows)}")
    global_blocks = tuple(block for block, size in enumerate(sizes) if size == grid)
    return {"global_blocks": global_blocks, "window": next(iter(windows))[0] if windows else max(grid)}


def write(export: Export, file: Path) -> dict[str, Any]:
    """Writes the encoder as `image_encoder.*`, with the other parts of a whole SAM."""
    arguments = peer_arguments(export.sam.config)
    torch.save(to_segment_anything(export.sam_weights), file)
    return {
        "class": "segment_anything.modeling.ImageEncoderViT",
        "whole": export.segmenter is not None,
        "arguments": arguments | {"norm_layer": "functools.partial(torch.nn.LayerNorm, eps=1e-6)"},
        "merged_into": export.merge_into and str(export.merge_into),
    }


def compare(export: Export, file: Path, images: Tensor) -> Iterator[Comparison]:
    peer = peer_encoder(peer_arguments(export.sam.config))
    contents, prefix = read(file), SEGMENT_ANYTHING_ENCODER
    encoder = {key.removeprefix(prefix): value for key, value in contents.items() if key.startswith(prefix)}
    problems = peer.load_state_dict(encoder, strict=False)
    refuse_other_keys("segment-anything", problems.missing_keys, problems.unexpected_keys)
    embedding = export.sam(images)
    yield Comparison(peer.eval()(images), embedding, "image embeddings")
    if export.segmenter is not None:
        yield from _masks(export.segmenter, contents, embedding)


def _masks(model: Segmenter, contents: dict[str, Any], embedding: Tensor) -> Iterator[Comparison]:
    """Compares the masks for a point and for a box on one image."""
    sam = peer_sam(model.encoder.config)
    problems = sam.load_state_dict(contents, strict=False)
    refuse_other_keys("segment-anything", problems.missing_keys, problems.unexpected_keys)
    places, row = sam.prompt_encoder.get_dense_pe(), torch.zeros(1, dtype=torch.long)
    point, box = example_prompts(model.encoder.config.image_size[0])
    for prompts, asked, of in (
        (point, ((point.points, point.labels), None), "masks of a point"),
        (box, (None, box.boxes), "masks of a box"),
    ):
        logits, _ = sam.mask_decoder(embedding, places, *sam.prompt_encoder(*asked, None), multimask_output=True)
        yield Comparison(logits, model.answer(embedding, row, prompts, several=True).logits, of)


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


FORMAT = Format(
    sentence=".pth of segment-anything: a whole SAM (of one, or with --merge-into SAM), else a SAM-style encoder",
    suffix=".pth",
    peer="segment_anything",
    compared="image embeddings",
    write=write,
    compare=compare,
    holds="sam",
    whole_sam=True,
)
