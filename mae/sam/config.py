"""Settings of task=segment, and the model built from them."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from mae.errors import ConfigError
from mae.models.config import MAEConfig
from mae.models.execution import BlocksConfig
from mae.sam.convert import sam_config
from mae.sam.encoder import SamEncoder
from mae.sam.lora import add_lora
from mae.sam.segmenter import Segmenter
from mae.train.average import AverageConfig


class SegmentConfig(AverageConfig, frozen=True, extra="forbid"):
    """Settings of task=segment; the defaults are SAM's (Kirillov et al. 2023, appendix A).

    image_size, window, global_blocks, out_channels
                     of the SAM-style encoder; global_blocks None: the last block of each quarter
    masks_per_image  at most, drawn anew each time an image is shown
    masks_at_a_time  of a micro-batch: activations of the others are computed again in the backward pass; None: all
    min_area         smallest object that is trained on, as a share of the frame; ignored where all are smaller
    clicks           corrections after the first prompt; two answers to the mask alone are added to them
    mask_input       give each correction the logits of the answer before; without, the two answers are left out
    multimask        answer the first prompt by three masks, of which the best is trained; else by one
    box_share        share of the objects whose first prompt is a box
    drop_path        probability of leaving out the last block in training, falling linearly to 0 at the first
    encoder          trained parameters: all; frozen (the neck only); lora (the neck, and LoRA on qkv)
    lora_rank        rank of LoRA, whose alpha is twice as much
    decoder          trained: prompt encoder and mask decoder are trained; frozen
    decoder_from     a whole SAM whose prompt encoder and mask decoder a fresh run starts from; None: those of
                     `init_from`, else random weights
    embeddings       folder in which the tokens of a frozen encoder are kept from epoch to epoch and from run to run
    relevance        prompts gate the embedding, as in a RelevanceAwareEncoder; no other library loads such a model
    alignment        weight of `relevance_alignment_loss`, by which the gate learns to cover the object
    ema              of all weights that are trained; their average is what is validated, and loaded and exported by
                     default
    """

    name: Literal["segment"]
    image_size: int = Field(1024, ge=1)
    window: int = Field(14, ge=1)
    global_blocks: tuple[int, ...] | None = None
    out_channels: int = Field(256, ge=1)
    masks_per_image: int = Field(64, ge=1)
    masks_at_a_time: int | None = Field(None, ge=1)
    min_area: float = Field(0.0, ge=0, lt=1)
    clicks: int = Field(8, ge=0)
    mask_input: bool = True
    multimask: bool = True
    box_share: float = Field(0.5, ge=0, le=1)
    drop_path: float = Field(0.0, ge=0, lt=1)
    encoder: Literal["all", "frozen", "lora"] = "all"
    lora_rank: int = Field(8, ge=1)
    decoder: Literal["trained", "frozen"] = "trained"
    decoder_from: Path | None = None
    embeddings: Path | None = None
    relevance: bool = False
    alignment: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> "SegmentConfig":
        if self.alignment and not self.relevance:
            raise ValueError(f"alignment={self.alignment} trains the gate that relevance=true adds: set both")
        return self

    @property
    def sam_fields(self) -> dict[str, Any]:
        """Returns the fields of SamConfig that are set, for `to_sam`."""
        fields = self.model_dump(include={"image_size", "window", "global_blocks", "out_channels"})
        return {name: value for name, value in fields.items() if value is not None}


def build_segmenter(config: MAEConfig, task: SegmentConfig, blocks: BlocksConfig) -> Segmenter:
    """Builds a Segmenter with random weights. Raises ConfigError if the settings do not fit together."""
    if config.in_channels != 3:
        raise ConfigError(
            f"model.in_channels={config.in_channels}, and task=segment takes RGB photographs: set model.in_channels=3. "
            "An encoder of other channels that init_from= names is converted"
        )
    if blocks.recompute not in ("none", "all"):
        raise ConfigError(
            f"blocks.recompute={blocks.recompute} is not available for task=segment: set blocks.recompute=none or all"
        )
    encoder = SamEncoder(sam_config(config, task.sam_fields), drop_path=task.drop_path)
    if blocks.compile:
        encoder.compile_blocks()
    return Segmenter(encoder, checkpointing=blocks.recompute == "all", relevance=task.relevance)


def set_trainable(model: Segmenter, task: SegmentConfig) -> None:
    """Freezes what `task.encoder` and `task.decoder` say, or adds LoRA to the encoder. Its neck is always trained."""
    if task.decoder == "frozen":
        model.prompt_encoder.requires_grad_(False)
        model.mask_decoder.requires_grad_(False)
    if not task.mask_input:
        model.prompt_encoder.mask_embed.requires_grad_(False)  # gets no gradient, for which DDP would wait
    if task.encoder == "all":
        return
    encoder = model.encoder
    encoder.requires_grad_(False)
    if task.encoder == "lora":
        add_lora(encoder, task.lora_rank)
    encoder.neck.requires_grad_(True)
