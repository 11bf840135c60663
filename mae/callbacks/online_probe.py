"""Online evaluation: logs kNN accuracy and effective rank (RankMe) of the encoder's features every `every` steps."""

import time
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch

from mae.callbacks.online_dense import OnlineDense
from mae.callbacks.step_callback import StepCallback
from mae.callbacks.throughput import Throughput
from mae.distributed.ranks import gather_to_rank_zero
from mae.probes.features import Features, concatenate_by_sample, describe, rankme
from mae.probes.knn import knn_accuracy
from mae.train.training import Training

Loader = Iterable[dict[str, Any]]


class OnlineProbe(StepCallback):
    """Logs every `every` steps to all loggers; features are the mean patch tokens of unmasked images.

    knn/top1             share of the test images whose k nearest training images vote for their class
    rank/rankme          effective rank of the features of the test images
    knn_average/top1 …   the same of the averaged encoder (task.ema)
    perf/probe_share     share of the time since this start that the probe took

    dense/miou           mean IoU of a segmentation by the nearest patch tokens, see OnlineDense

    train, test  this rank's centre crops, always the same; `train` is None without labels, and knn/top1 is left out
    dense        None: not measured

    Only reads the weights: no parameter, random state or counter of the run changes.
    """

    def __init__(self, every: int, k: int, train: Loader | None, test: Loader, dense: OnlineDense | None) -> None:
        self.every, self.k, self.dense = every, k, dense
        self.train, self.test = train, test
        self.seconds = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.since = time.perf_counter()

    def on_step_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.global_step % self.every:
            return
        begun = time.perf_counter()
        # A loader draws the seed of its workers from torch's default generator.
        with torch.random.fork_rng(devices=[]):
            found = self.measure(trainer, module)
        seconds = time.perf_counter() - begun
        self.seconds += seconds
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(callback, Throughput):
                callback.pause(seconds)
        found["perf/probe_share"] = self.seconds / (time.perf_counter() - self.since)
        for logger in trainer.loggers:
            logger.log_metrics(found, step=trainer.global_step)

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
        """Returns the metrics on rank 0, elsewhere an empty dictionary. A collective."""
        assert isinstance(module, Training)
        encoders: dict[str, Any] = {"": module.model} | ({} if module.average is None else {"_average": module.average})
        tests = self._features(trainer, module, encoders, self.test)
        trains = self._features(trainer, module, encoders, self.train) if self.train is not None else {}
        dense = self.dense.measure(trainer, module, encoders) if self.dense is not None else {}
        found = dense | {f"rank{of}/rankme": rankme(test.values) for of, test in tests.items()}
        return found | {f"knn{of}/top1": knn_accuracy(train, tests[of], self.k) for of, train in trains.items()}

    @torch.no_grad()
    def _features(
        self, trainer: pl.Trainer, module: Training, encoders: dict[str, Any], loader: Loader
    ) -> dict[str, Features]:
        """Returns the features by each encoder on rank 0, elsewhere an empty dictionary."""
        parts: dict[str, list[Features]] = {of: [] for of in encoders}
        for batch in loader:
            images = module.pixels.normalise(batch["images"].to(module.device))
            for of, encoder in encoders.items():
                with trainer.precision_plugin.forward_context():
                    latent = encoder.encode(images)
                values = describe(latent, encoder.config.class_tokens, "patches").cpu()
                parts[of] += gather_to_rank_zero(Features(batch["positions"], batch["labels"], values))
        return {of: concatenate_by_sample(each) for of, each in parts.items()} if trainer.is_global_zero else {}
