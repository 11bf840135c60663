"""SAM: image encoder, and the prompt encoder and mask decoder of transformers (Apache-2.0)."""

from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mae.errors import ConfigError
from mae.models.patches import require_size
from mae.sam.encoder import SamConfig, SamEncoder
from mae.sam.relevance import PromptGate

STRIDE = 4  # pixels of the image per cell of the masks
NONE, BACKGROUND, FOREGROUND = -1, 0, 1  # labels of points


class Prompts(NamedTuple):
    """Prompts, one row per mask. Coordinates are (x, y) in pixels of the frame, 0 the centre of the first.

    points  [N, P, 2]     clicks; the first is ignored in rows that have a box
    labels  [N, P]        FOREGROUND, BACKGROUND, or NONE for an empty slot
    boxes   [N, 4]        x0, y0, x1, y1
    boxed   [N]           whether the row has a box
    logits  [N, 1, h, w]  of an earlier answer, or None
    """

    points: Tensor
    labels: Tensor
    boxes: Tensor
    boxed: Tensor
    logits: Tensor | None = None


class Answer(NamedTuple):
    """Masks in cells of STRIDE pixels, with predicted IoUs.

    logits  [N, K, S/4, S/4]  above 0 inside the object
    ious    [N, K]
    gate    [N, h, w]  relevance of each token of the embedding to the prompts, 0 to 1; None without relevance
    """

    logits: Tensor
    ious: Tensor
    gate: Tensor | None = None

    def best(self) -> Tensor:
        """Returns the logits of the mask with the highest predicted IoU of each row, [N, 1, S/4, S/4]."""
        rows = torch.arange(len(self.ious), device=self.ious.device)
        return self.logits[rows, self.ious.argmax(1)][:, None]


class Segmenter(nn.Module):
    """SAM with an encoder of any size, for square images (Kirillov et al. 2023). Parameters outside the encoder have
    transformers' names.

    checkpointing  activation checkpointing of the encoder's blocks and of the decoder's answers
    relevance      prompts gate the embedding, as in a RelevanceAwareEncoder

    Raises ConfigError if images are not square, patches are not of 16 pixels, out_channels is not a multiple of 32, or
    transformers is not installed.
    """

    def __init__(self, encoder: SamEncoder, *, checkpointing: bool = False, relevance: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        self.encoder.checkpointing = self.checkpointing = checkpointing
        self.prompt_encoder, self.mask_decoder = build_prompt_encoder_and_mask_decoder(encoder.config)
        self.relevance = PromptGate(encoder.config.out_channels) if relevance else None

    def forward(self, images: Tensor) -> Tensor:
        """Returns image embeddings: normalised [B, 3, S, S] -> [B, C, S/p, S/p]."""
        require_size(images, self.encoder.config.image_size, self.encoder.config.patch_size)
        return self.encoder(images)

    def at(self, image_size: int) -> "Segmenter":
        """Returns the SAM for square images of another size: a copy, with the encoder of `SamEncoder.at`."""
        with torch.random.fork_rng(devices=[]):  # the weights that are drawn are replaced
            model = Segmenter(self.encoder.at(image_size), relevance=self.relevance is not None)
        model.load_state_dict(self.other_parts(), strict=False)
        return model.train(self.training)

    def tokens(self, images: Tensor) -> Tensor:
        """Returns the output of the encoder's last block: normalised [B, 3, S, S] -> [B, h, w, D]."""
        require_size(images, self.encoder.config.image_size, self.encoder.config.patch_size)
        return self.encoder.tokens(images)

    def neck(self, tokens: Tensor) -> Tensor:
        """Returns the image embeddings of tokens."""
        return self.encoder.neck(rearrange(tokens, "b h w d -> b d h w"))

    def other_parts(self) -> dict[str, Tensor]:
        """Returns the weights outside the encoder."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("encoder.")}

    def answer(self, embedding: Tensor, rows: Tensor, prompts: Prompts, *, several: bool) -> Answer:
        """Decodes masks for prompts on embedded images.

        embedding  [B, C, h, w]
        rows       [N]  the image of each prompt
        several    three masks, for an ambiguous prompt, or one
        """
        arguments = (embedding, rows, prompts, several)
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._answer, *arguments, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore
        return self._answer(*arguments)

    def _answer(self, embedding: Tensor, rows: Tensor, prompts: Prompts, several: bool) -> Answer:
        sparse, dense = self.embed(prompts)
        embedding, gate = embedding[rows], None
        if self.relevance is not None:
            embedding, gate, _ = self.relevance.participate(self.relevance.propose(embedding), sparse)
        logits, ious = self.mask_decoder(
            image_embeddings=embedding,
            image_positional_embeddings=self.positions().expand(len(rows), -1, -1, -1),
            sparse_prompt_embeddings=sparse[:, None],
            dense_prompt_embeddings=dense,
            multimask_output=several,
        )
        return Answer(logits[:, 0], ious[:, 0], gate)

    def embed(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Embeds prompts as tokens [N, P + 1, C], and as a map [N, C, h, w] that is added to the embedding.

        The two tokens of a box take the places of the first point and of "not a point", so that rows with and without a
        box are equally long: the order of the tokens has no meaning.

        Autocast has no part in it: bfloat16 would round coordinates to 2 pixels of 1024.
        """
        logits, dtype = prompts.logits, self.prompt_encoder.no_mask_embed.weight.dtype
        logits = None if logits is None else logits.to(dtype)
        with torch.autocast(prompts.points.device.type, enabled=False):
            points, dense = self.prompt_encoder(prompts.points[:, None], prompts.labels[:, None], None, logits)
            corners, _ = self.prompt_encoder(None, None, prompts.boxes[:, None], None)
        points, corners = points[:, 0], corners[:, 0]
        with_box = torch.cat([corners[:, :1], points[:, 1:-1], corners[:, 1:]], 1)
        return torch.where(prompts.boxed[:, None, None], with_box, points), dense

    def positions(self) -> Tensor:
        """Returns the position embedding of the tokens of the image embedding, [1, C, h, w]."""
        side = self.encoder.config.grid[0]
        places = (torch.arange(side, device=self.encoder.pos_embed.device) + 0.5) / side
        grid = torch.stack(torch.meshgrid(places, places, indexing="xy"), -1)
        with torch.autocast(grid.device.type, enabled=False):
            return rearrange(self.prompt_encoder.shared_embedding(grid), "h w c -> 1 c h w")


def build_prompt_encoder_and_mask_decoder(config: SamConfig) -> tuple[Any, Any]:
    """Builds transformers' SamPromptEncoder and SamMaskDecoder for an encoder, with random weights."""
    try:
        from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPromptEncoder
    except ImportError as error:
        raise ConfigError(
            "segmentation takes its prompt encoder and mask decoder from the package transformers, which is not "
            "installed: pip install 'mae-pretrain[sam]'"
        ) from error
    settings = transformers_config(config)
    prompt_encoder, mask_decoder = SamPromptEncoder(settings), SamMaskDecoder(settings.mask_decoder_config)
    # segment-anything's are fixed and of deviation 1; transformers would take half the width of the encoder.
    nn.init.normal_(prompt_encoder.shared_embedding.positional_embedding).requires_grad_(False)
    return prompt_encoder, mask_decoder


def transformers_config(config: SamConfig) -> Any:
    """Returns transformers' SamConfig of a whole SAM with this encoder; the exporter completes its vision part."""
    from transformers import SamConfig as TransformersConfig

    (side, other), patch, width = config.image_size, config.patch_size, config.out_channels
    if side != other:
        raise ConfigError(
            f"image_size={[side, other]} is not square, and SAM takes square images only: "
            "set task.image_size to one number"
        )
    if patch != 4 * STRIDE:
        raise ConfigError(
            f"patch_size={patch} does not fit SAM's masks, which have 4x4 cells per patch: set it to {4 * STRIDE}"
        )
    if width % 32:
        raise ConfigError(
            f"out_channels={width} is not a multiple of 32, which the 8 heads of SAM's mask decoder need: "
            "set task.out_channels to such a multiple"
        )
    prompts = {"hidden_size": width, "image_size": side, "patch_size": patch}
    # 1e-5 is torch's default, which segment-anything's decoder has.
    decoder = {"hidden_size": width, "mlp_dim": 8 * width, "iou_head_hidden_dim": width, "layer_norm_eps": 1e-5}
    vision = {"image_size": side, "patch_size": patch, "output_channels": width, "num_pos_feats": width // 2}
    settings: Any = TransformersConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    settings.mask_decoder_config._attn_implementation = "sdpa"
    return settings
