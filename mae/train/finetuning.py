"""Lightning module of fine-tuning for classification: mixes images on the device, returns the loss."""

from typing import Any, Literal, cast

import torch
from pydantic import Field
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.nn import functional as F

from mae.models.classifier import Classifier, Pool, topk_correct
from mae.models.config import ImageSize
from mae.models.flops import classification_flops
from mae.train.average import AverageConfig
from mae.train.layer_decay import build_layer_decayed_optimizer
from mae.train.optim import NamedAdamW
from mae.train.strategies import shard
from mae.train.training import Training


class FinetuneConfig(AverageConfig, frozen=True, extra="forbid"):
    """Settings of task=finetune (He et al. 2022, table 9).

    classes          None: as many as manifest.json names, else counted from the labels of the training images
    image_size       None: that of `init_from`, else of `model`; positions are resized
    pool             input of the head: the mean of the patch tokens, or the class token
    drop_path        stochastic depth: rate of the last block, falling linearly to 0 at the first
    mixup, cutmix    parameter of the beta distribution; 0: none. With both, each has half of the micro-batches
    label_smoothing  share of a label that is spread over all classes
    erasing          share of the images in which a rectangle is replaced by noise
    ema              of all weights; their average is what is validated, and loaded and exported by default
    """

    name: Literal["finetune"]
    classes: int | None = Field(None, ge=2)
    image_size: ImageSize | None = None
    pool: Pool = "patches"
    drop_path: float = Field(0.1, ge=0, lt=1)
    mixup: float = Field(0.8, ge=0)
    cutmix: float = Field(1.0, ge=0)
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    erasing: float = Field(0.25, ge=0, le=1)

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


def vit_layer(name: str, depth: int) -> int:
    """Returns the layer of a parameter: 0 makes tokens, 1 … depth are blocks, depth + 1 is the head and its norm.

    The encoder's own norm belongs to the last block, as in timm.
    """
    first, *rest = name.split(".")
    if first in ("patch_embed", "pos_embed", "cls_token"):
        return 0
    if first == "blocks":
        return int(rest[0]) + 1
    return depth if first == "norm" else depth + 1


class Finetuning(Training):
    """Fine-tuning of a classifier.

    A batch holds `images` uint8 [B, C, H, W] and `labels` int64 [B].
    """

    model: Classifier

    def __init__(self, *arguments: Any, task: FinetuneConfig, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.task = task
        self.mixup = Mixup(task.mixup, task.cutmix, label_smoothing=0, num_classes=self.model.classes)

    @property
    def flops(self) -> float:
        return classification_flops(self.model.config, self.model.classes)

    def shard(self, model: Any, mesh: Any, *, reshard: bool | None = None) -> None:
        shard(model, model.blocks, mesh, reshard=reshard)

    def build_optimizer(self) -> NamedAdamW:
        named, depth = self.model.named_parameters(), self.model.config.depth
        return build_layer_decayed_optimizer(named, self.optim, self.schedule.peak_lr, vit_layer, depth)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        images, targets = self.pixels.normalise(batch["images"]), batch["labels"]
        if self.task.erasing:
            images = RandomErasing(self.task.erasing, mode="pixel", device=cast(Any, self.device))(images)
        if self.task.mixes:
            images, targets = self.mixup(images, targets)
        scores = self.model(images, torch.rand(len(images), 1, device=images.device)).float()
        # Label smoothing is linear in the targets, so smoothing after mixup equals timm's smoothing before it.
        return F.cross_entropy(scores, targets, label_smoothing=self.task.label_smoothing)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["mae"]["classes"] = self.model.class_names

    def blank_batch(self, count: int) -> dict[str, Any]:
        config = self.model.config
        images = torch.zeros(count, config.in_channels, *config.image_size, dtype=torch.uint8, device=self.device)
        return {"images": images, "labels": torch.zeros(count, dtype=torch.int64, device=self.device)}

    def validate(self, batch: dict[str, Any]) -> tuple[dict[str, float], int]:
        """Validates the EMA weights if `task.ema` is set, else the trained weights."""
        labels, count = batch["labels"], len(batch["images"])
        model = self.average if self.average is not None else self.model
        scores = model(self.pixels.normalise(batch["images"])).float()
        means = {"loss": float(F.cross_entropy(scores, labels))}
        return means | {f"top{k}": topk_correct(scores, labels, k) / count for k in (1, 5)}, count
