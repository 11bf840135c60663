"""Fine-tuning for classification (task=finetune)."""

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from data.index.classes import differing_label, some
from data.index.index import ShardIndex
from data.loader.streaming import StreamShards
from mae.distributed.rank_zero import say
from mae.errors import ConfigError, first_sentence
from mae.formats.load import load
from mae.formats.opened import Opened, open_weights, other_scale
from mae.formats.warm_start import resampling, unsaid_heads
from mae.models.classifier import Classifier, build_classifier
from mae.models.config import MAEConfig
from mae.models.execution import prepare_blocks
from mae.models.mae import MaskedAutoencoder
from mae.models.resample import at_image_size
from mae.models.vit import Encoder
from mae.run.checkpoint_files import read_own
from mae.train.finetuning import FinetuneConfig, Finetuning
from tasks.task import Task

MANY_CLASSES = 10_000  # with more, labels may be ids


class Finetune(Task[FinetuneConfig]):
    """A classifier on labelled images. Its encoder is that of `init_from`, else a new one by `model`."""

    settings_type = FinetuneConfig
    training = Finetuning
    loss = "cross-entropy"

    @cached_property
    def _opened(self) -> Opened:
        return open_weights(self.config.init_from or "", weights=self.config.init_weights)

    @cached_property
    def source(self) -> Encoder | None:
        """Loads the encoder or classifier in `init_from`; None without it."""
        if self.config.init_from is None:
            return None
        opened = self._opened
        # The decoder is dropped: any number of heads will do for it.
        found = load(opened, decoder_num_heads=1, **unsaid_heads(opened, self.config.model))
        return at_image_size(found, found.config.image_size) if isinstance(found, MaskedAutoencoder) else found

    @cached_property
    def encoder(self) -> Encoder | None:
        """Resamples the encoder in `init_from` to `task.image_size` and the channels of the images; None without it."""
        if self.source is None:
            return None
        return self.source.at(self.settings.image_size, in_channels=len(self.config.data.mean))

    @property
    def keeps_head(self) -> bool:
        """Returns whether `init_from` is a classifier of the same classes, by name, and of the same pooling."""
        source = self.source
        if not isinstance(source, Classifier) or source.pool != self.settings.pool:
            return False
        return source.class_names == self.class_names != []

    def say_what_is_taken_over(self) -> None:
        """Prints a line for each part of `init_from` that is resampled, left out or taken over with the encoder."""
        assert self.source is not None and self.encoder is not None
        said = resampling(self.source.config, self.encoder.config, decoder=False)
        if self.keeps_head:
            said.append(f"its head is taken over, since its {self.classes} classes have the same names")
        elif isinstance(self.source, Classifier):
            said.append(
                f"left out: its head of {self.source.classes} classes; a new one of {self.classes} starts afresh"
            )
        said += other_scale(self._opened, (self.config.data.mean, self.config.data.std))
        for sentence in said:
            say(f"init_from: {sentence}")

    @property
    def architecture(self) -> MAEConfig:
        if self.encoder is not None:
            return self.encoder.config
        model, size = self.config.model, self.settings.image_size
        try:
            return MAEConfig.model_validate(model.model_dump() | ({"image_size": size} if size else {}))
        except ValidationError as error:
            raise ConfigError(f"task.{first_sentence(error)}") from error

    @cached_property
    def classes(self) -> int:
        """`task.classes`, else as many as manifest.json names or labels say.

        Raises ConfigError if the labels do not fit, DataError if the parts number their classes differently.
        """
        given, data = self.settings.classes, self.config.data
        streamed = data.mode == "stream"
        if given is None and (streamed or not data.named):
            raise ConfigError("task.classes is not set, and there is no index of labels to count them in: set it")
        if given is not None and not data.named:
            return given
        names = self.data.class_names
        classes = given or len(names) or int(self.data.train_index.labels.max()) + 1
        for part, index in (("training", self.data.train_index), ("validation", self.data.val_index)):
            if index is not None and not (streamed and part == "training"):
                refuse_labels(index, part, classes, names)
        if given is None:
            refuse_count(self.data.train_index.labels, classes, names)
        return classes

    @cached_property
    def class_names(self) -> list[str]:
        """Names of the classes by label; numbers for those that manifest.json lacks, [] if it names none."""
        names = self.data.class_names if self.config.data.named else []
        more = [str(label) for label in range(len(names), self.classes)]
        return [*names, *more][: self.classes] if names else []

    def recipe(self, precision: str) -> dict[str, Any]:
        task = self.settings.model_dump(mode="json", exclude={"image_size"})  # "model" has it
        return super().recipe(precision) | {"task": task | {"classes": self.classes}}

    def model(self, checkpoint: Path | None) -> Classifier:
        config, task = self.config, self.settings
        if checkpoint is not None:
            refuse_other_classes(read_own(checkpoint)["mae"].get("classes", []), self.class_names, checkpoint)
        for remark in self.data.remarks_on_labels():
            say(f"labels: {remark}")
        if isinstance(self.data.train_index, StreamShards):
            self.data.train_index.classes = self.classes
        if self.encoder is not None:
            model = build_classifier(self.encoder, self.classes, task.pool, task.drop_path, self.keeps_head)
            if checkpoint is None:
                self.say_what_is_taken_over()
        else:
            model = Classifier(self.architecture, self.classes, task.pool, task.drop_path)
        model.class_names = self.class_names
        prepare_blocks(list(model.blocks), config.blocks)
        return model

    @property
    def unit(self) -> int:
        return math.lcm(super().unit, 2) if self.settings.mixes else super().unit  # images are mixed in pairs

    def refuse_settings(self, checkpoint: Path | None) -> None:
        super().refuse_settings(checkpoint)
        if self.settings.pool == "class_token" and not self.architecture.class_tokens:
            raise ConfigError("task.pool=class_token, but the encoder has no class token: use task.pool=patches")

    def averaged(self, model: Classifier) -> Classifier:
        return Classifier(model.config, model.classes, model.pool)

    def module_arguments(self, model: Classifier, recipe: dict[str, Any]) -> dict[str, Any]:
        return {"task": self.settings}

    def results(self, module: Finetuning, step: int) -> dict[str, Any]:
        return {"classes": self.class_names}

    @property
    def probe(self) -> str | None:
        return None if self.data.val_index is None else "classify"

    def next_steps(self) -> dict[str, str]:
        return super().next_steps() | self.use_encoder()

    def describe(self, model: Classifier) -> dict[str, str]:
        config, task = self.architecture, self.settings
        parameters = sum(parameter.numel() for parameter in model.parameters())
        rows, columns = config.grid
        return {
            "model": f"classifier of {self.classes} classes, encoder {config.width} x {config.depth} blocks, "
            f"{parameters / 1e6:.1f} M parameters",
            **({"classes": some(self.class_names)} if self.class_names else {}),
            "patches": f"{rows} x {columns} of {config.patch_size} px",
            "fine-tuning": f"layer decay {self.config.optim.layer_decay}, drop path {task.drop_path}, "
            f"mixup {task.mixup}, cutmix {task.cutmix}, erasing {task.erasing}, smoothing {task.label_smoothing}, "
            f"{self.config.data.rand_augment or 'no RandAugment'}",
        }


def refuse_other_classes(stored: list[str], names: list[str], checkpoint: Path) -> None:
    """Raises ConfigError if the classes of a checkpoint have other names than those of the images."""
    if different := differing_label(stored, names):
        label, before, now = different
        raise ConfigError(
            f"{checkpoint} belongs to a different run: label {label} was {before!r} there and is {now!r} in the "
            "images. Resume with the images that it was trained on, or start a new run with another name="
        )


def refuse_count(labels: np.ndarray, classes: int, names: list[str]) -> None:
    """Raises ConfigError if there is one class, or if most of many have no image and no name: labels are then ids."""
    found = len(np.unique(labels))
    if classes < 2:
        raise ConfigError(
            "task=finetune needs several classes, and all images are of one: pack the folder that holds them"
        )
    if classes > MANY_CLASSES and classes > 10 * found and all(name.isdecimal() for name in names):
        raise ConfigError(
            f"the labels of the training images go up to {classes - 1:,}, and {found:,} different ones occur: they "
            f"look like ids, and the head would have {classes:,} outputs. Number the classes from 0 on in the .cls, or "
            f"set task.classes={classes} if that is meant"
        )


def refuse_labels(index: ShardIndex, part: str, classes: int, names: list[str]) -> None:
    """Raises ConfigError if an image has no label, or one that is not below `classes` or has no name beside others."""
    labels = index.labels
    if missing := int((labels < 0).sum()):
        raise ConfigError(
            f"task=finetune needs labels, and {missing} of {len(labels)} {part} images have none "
            f"({index.explain_label(int(labels.argmin()))}): pack a folder with a sub-folder for each class"
        )
    if names and labels.max() >= len(names):
        raise ConfigError(
            f"manifest.json names {len(names)} classes, and the labels of the {part} images go up to {labels.max()}, "
            "counted from 0: complete its list, or pack the images anew"
        )
    if labels.max() >= classes:
        raise ConfigError(
            f"task.classes={classes}, but the labels of the {part} images go up to {labels.max()}, counted from 0: set "
            f"task.classes to at least {labels.max() + 1}"
        )
