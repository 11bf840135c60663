"""Lightning module of SAM-style fine-tuning: photographs, objects, simulated clicks."""

from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor

from mae.sam.config import SegmentConfig
from mae.sam.embedding_cache import TokenCache
from mae.sam.flops import sam_flops
from mae.sam.segmenter import Segmenter
from mae.sam.session import Session, simulate_session
from mae.sam.square_frame import blank_padding
from mae.train.optim import NamedAdamW, layer_decayed_adamw
from mae.train.strategies import shard
from mae.train.training import Training


def sam_layer(name: str, depth: int) -> int:
    """Returns the layer of a Segmenter's parameter: 0 embeds patches, 1 … depth are blocks, depth + 1 is the rest."""
    words = name.split(".")
    if words[:2] in (["encoder", "patch_embed"], ["encoder", "pos_embed"]):
        return 0
    return int(words[2]) + 1 if words[:2] == ["encoder", "blocks"] else depth + 1


class Segmentation(Training):
    """Promptable segmentation, trained by simulated sessions.

    A batch holds `images` uint8 [B, 3, S, S], `inside` int64 [B, 2] (height, width of the photograph in the frame),
    `masks` bool [N, S/4, S/4] of all images and `rows` int64 [N], the image of each; `samples` int64 [B].

    cache  tokens of a frozen encoder for the training images, or None
    """

    model: Segmenter

    def __init__(self, *arguments: Any, task: SegmentConfig, cache: TokenCache | None = None, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.task = task
        self.cache = cache

    @property
    def flops(self) -> float:
        """FLOPs of the encoder per image, next to which the rest is small at 1024 x 1024; forward alone if frozen."""
        return sam_flops(self.model.encoder.config) * (1 if self.task.encoder == "frozen" else 3)

    def shard(self, mesh: Any) -> None:
        shard(self.model, cast(Any, self.model.encoder.blocks), mesh, entrances=("answer",))

    def build_optimizer(self) -> NamedAdamW:
        named, depth = self.model.named_parameters(), self.model.encoder.config.depth
        return layer_decayed_adamw(named, self.optim, self.schedule.peak_lr, sam_layer, depth)

    def embed(self, batch: dict[str, Any], cache: TokenCache | None = None) -> Tensor:
        """Returns the image embeddings of a batch; the tokens of a frozen encoder come from `cache`."""
        images = blank_padding(self.pixels.normalise(batch["images"]), batch["inside"])
        if self.task.encoder != "frozen":
            return self.model(images)
        encoder = self.model.encoder.eval()
        with torch.no_grad():
            tokens = encoder.tokens(images) if cache is None else cache(encoder, images, batch["samples"])
        return encoder.neck(rearrange(tokens, "b h w d -> b d h w"))

    def session(self, embedding: Tensor, batch: dict[str, Any], generator: torch.Generator) -> Session:
        task = self.task
        return simulate_session(
            self.model,
            embedding,
            batch["masks"],
            batch["rows"],
            clicks=task.clicks,
            box_share=task.box_share,
            alignment=task.alignment,
            generator=generator,
        )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        # Training has seeded torch's generator for this micro-batch.
        seed = int(torch.randint(2**62, ()))
        generator = torch.Generator(self.device).manual_seed(seed)
        loss = self.session(self.embed(batch, self.cache), batch, generator).loss
        return {"loss": loss, "value": loss.detach()}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Validates by sessions that follow from the seed and the batch's first sample: the same every time."""
        if len(batch["images"]) == 0:  # more ranks than samples
            return
        seed = self.seed * 2**32 + int(batch["samples"][0])
        session = self.session(self.embed(batch), batch, torch.Generator(self.device).manual_seed(seed))
        count = len(batch["masks"])
        self.tally("loss", float(session.loss), count)
        self.tally("first_iou", float(session.first_iou), count)
        self.tally("last_iou", float(session.last_iou), count)

    def blank_batch(self) -> dict[str, Any]:
        side = self.model.encoder.config.image_size[0]
        masks = torch.zeros(2, side // 4, side // 4, dtype=torch.bool, device=self.device)
        masks[:, : side // 8] = True
        rows = torch.arange(2, device=self.device)
        return {
            "images": torch.zeros(2, 3, side, side, dtype=torch.uint8, device=self.device),
            "inside": torch.full((2, 2), side, device=self.device),
            "masks": masks,
            "rows": rows,
            "samples": rows,
        }
