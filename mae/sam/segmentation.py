"""Lightning module of SAM-style fine-tuning: photographs, objects, simulated clicks."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from mae.sam.config import SegmentConfig
from mae.sam.embedding_cache import TokenCache
from mae.sam.flops import ENCODER_PASSES, sam_flops
from mae.sam.segmenter import Segmenter
from mae.sam.session import Session, draw_session, simulate_session
from mae.sam.square_frame import blank_padding
from mae.train.layer_decay import build_layer_decayed_optimizer
from mae.train.optim import NamedAdamW
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
        """FLOPs of the encoder per image. Those of the sessions depend on how many objects an image has."""
        return sam_flops(self.model.encoder.config) * ENCODER_PASSES[self.task.encoder]

    def shard(self, model: Any, mesh: Any, *, reshard: bool | None = None) -> None:
        shard(model, model.encoder.blocks, mesh, ("tokens", "neck", "answer"), reshard)

    def build_optimizer(self) -> NamedAdamW:
        named, depth = self.model.named_parameters(), self.model.encoder.config.depth
        return build_layer_decayed_optimizer(named, self.optim, self.schedule.peak_lr, sam_layer, depth)

    def embed(self, model: Segmenter, batch: dict[str, Any], cache: TokenCache | None = None) -> Tensor:
        """Returns the image embeddings of a batch; the tokens of a frozen encoder come from `cache`."""
        images = blank_padding(self.pixels.normalise(batch["images"]), batch["inside"])
        if self.task.encoder != "frozen":
            return model(images)
        model.encoder.eval()
        with torch.no_grad():
            tokens = model.tokens(images) if cache is None else self.kept_tokens(cache, images, batch["samples"])
        return model.neck(tokens)

    def kept_tokens(self, cache: TokenCache, images: Tensor, samples: Tensor) -> Tensor:
        """Returns the tokens [B, h, w, D] of images; computes and keeps those that the cache lacks."""
        tokens = [cache.read(sample) for sample in samples.tolist()]
        rows = [row for row, kept in enumerate(tokens) if kept is None]
        if isinstance(self.model, FSDPModule):
            lacking = torch.tensor(len(rows), device=images.device)
            if self.trainer.strategy.reduce(lacking, reduce_op="sum") and not rows:
                rows = [0]  # the forward pass of the others is collective
        if rows:
            for row, computed in zip(rows, self.model.tokens(images[rows]), strict=True):
                if tokens[row] is None:
                    tokens[row] = cache.keep(int(samples[row]), computed)
        return torch.stack([each for each in tokens if each is not None]).to(images.device).float()

    def session(
        self, model: Segmenter, batch: dict[str, Any], generator: torch.Generator, cache: TokenCache | None = None
    ) -> Session:
        task = self.task
        return simulate_session(
            model,
            self.embed(model, batch, cache),
            batch["masks"],
            batch["rows"],
            draw_session(len(batch["masks"]), task.clicks, task.mask_input, generator),
            box_share=task.box_share,
            mask_input=task.mask_input,
            multimask=task.multimask,
            alignment=task.alignment,
            at_a_time=task.masks_at_a_time,
        )

    def loss(self, batch: dict[str, Any]) -> Tensor:
        # Training has seeded torch's generator for this micro-batch.
        seed = int(torch.randint(2**62, ()))
        generator = torch.Generator(self.device).manual_seed(seed)
        return self.session(self.model, batch, generator, self.cache).loss

    def validate(self, batch: dict[str, Any]) -> tuple[dict[str, float], int]:
        """Validates by sessions that follow from the seed and the batch's first sample: the same every time.

        Of the EMA weights if `task.ema` is set, else of the trained weights.
        """
        seed = self.seed * 2**32 + int(batch["samples"][0])
        model = cast(Segmenter, self.model if self.average is None else self.average)
        session = self.session(model, batch, torch.Generator(self.device).manual_seed(seed))
        means = {"loss": session.loss, "first_iou": session.first_iou, "last_iou": session.last_iou}
        return {name: float(mean) for name, mean in means.items()}, len(batch["masks"])

    def blank_batch(self, count: int) -> dict[str, Any]:
        side = self.model.encoder.config.image_size[0]
        masks = torch.zeros(count, side // 4, side // 4, dtype=torch.bool, device=self.device)
        masks[:, : side // 8] = True
        rows = torch.arange(count, device=self.device)
        return {
            "images": torch.zeros(count, 3, side, side, dtype=torch.uint8, device=self.device),
            "inside": torch.full((count, 2), side, device=self.device),
            "masks": masks,
            "rows": rows,
            "samples": torch.full((count,), -1, device=self.device),
        }
