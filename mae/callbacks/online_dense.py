"""Online dense evaluation: mean IoU of a segmentation by the nearest patch tokens, while a run is under way."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from mae.distributed.rank_zero import warn
from mae.distributed.ranks import gather_to_rank_zero
from mae.errors import ConfigError
from mae.probes.dense_heads import NeighbourHead, predict_pixels
from mae.probes.dense_scores import count_pixels, segmentation_scores
from mae.probes.dense_targets import Classes, class_shares, find_classes
from mae.probes.dense_tokens import View, as_tensor, drawn_rows, encode_windows, thin
from mae.probes.windows import Size, crop_windows, resize_nearest
from mae.train.training import Training

TOKENS = 100  # of each training photograph


class Encoded(NamedTuple):
    """A photograph: its size before the encoder, its map, and the tokens of its windows, or rows, by each encoder."""

    sample: int
    shown: Size
    truth: Tensor
    tokens: dict[str, Tensor]


@dataclass
class OnlineDense:
    """Measures `dense/miou` and, with task.ema, `dense_average/miou`, as `probe=dense` does by `knn`.

    train, test  begin a pass over this rank's photographs with their maps, equally many on every rank; None for none
    names, void  of the classes, [] if unknown
    view         windows of the model's own size, so that no weight is resampled
    """

    train: Callable[[], Iterable[Any]]
    test: Callable[[], Iterable[Any]]
    names: list[str]
    void: int
    view: View
    k: int
    said: set[str] = field(default_factory=set)  # so that each is said once

    @property
    def window(self) -> Size:
        assert self.view.window is not None
        return self.view.window

    def measure(self, trainer: pl.Trainer, module: Training, encoders: Mapping[str, Any]) -> dict[str, float]:
        """Returns the metrics on rank 0, elsewhere an empty dictionary. A collective."""
        train = self._encode(trainer, module, encoders, self.train, drawn=TOKENS)
        test = self._encode(trainer, module, encoders, self.test, drawn=None)
        if not trainer.is_global_zero:
            return {}
        classes = find_classes([photograph.truth for photograph in (*train, *test)], self.names, self.void)
        return {f"dense{of}/miou": self._score(train, test, of, classes, module.device) for of in encoders}

    @torch.no_grad()
    def _encode(
        self,
        trainer: pl.Trainer,
        module: Training,
        encoders: Mapping[str, Any],
        photographs: Callable[[], Iterable[Any]],
        drawn: int | None,
    ) -> list[Encoded]:
        """Returns the photographs of all ranks that have a map, in the order of their samples, on rank 0."""
        found: list[Encoded] = []
        left_out: list[str] = []
        channels, window = encoders[""].config.in_channels, self.window
        for loaded in photographs():
            # Where weights are sharded every rank has to encode as often as all others: those without one, zeros.
            photograph = loaded if loaded is not None and not loaded.reason else None
            nothing = np.zeros((channels, *window), np.uint8)
            pixels = torch.from_numpy(nothing if photograph is None else photograph.image)
            shown: Size = (pixels.shape[-2], pixels.shape[-1])
            places = self.view.places(shown)
            normalised = module.pixels.normalise(pixels[None].to(module.device))[0]
            tokens = {}
            for of, encoder in encoders.items():
                with trainer.precision_plugin.forward_context():
                    tokens[of] = encode_windows(encoder, crop_windows(normalised, places, window), (-1,)).cpu()
            part = loaded and f"{loaded.key}: {loaded.reason}"
            if photograph is not None:
                truth = as_tensor(photograph.truth)
                if drawn is not None:
                    chosen = drawn_rows(0, photograph.sample, self.view.tokens(shown), drawn)
                    tokens = {of: thin(rows, chosen) for of, rows in tokens.items()}
                part = Encoded(photograph.sample, shown, truth, tokens)
            for each in gather_to_rank_zero(part):
                if isinstance(each, Encoded):
                    found.append(each)
                elif each is not None:
                    left_out.append(each)
        if left_out and not found:
            raise ConfigError(f"online_probe.dense_images: no photograph has a map that fits, first {left_out[0]}")
        if left_out and left_out[0] not in self.said:
            self.said.add(left_out[0])
            warn(f"online probe: {len(left_out):,} photographs have no map that fits, first {left_out[0]}")
        return sorted(found, key=lambda each: each.sample)

    def _score(
        self, train: list[Encoded], test: list[Encoded], of: str, classes: Classes, device: torch.device
    ) -> float:
        window = self.window
        values, targets = [], []
        for photograph in train:
            truth = resize_nearest(photograph.truth, photograph.shown)
            places = self.view.places(photograph.shown)
            chosen = drawn_rows(0, photograph.sample, self.view.tokens(photograph.shown), TOKENS)
            share = class_shares(truth, places, window, self.view.patch, classes)[chosen]
            known = share.sum(1) > 0
            width = photograph.tokens[of].shape[1] // 2  # the class token stands behind
            values.append(photograph.tokens[of][known, :width])
            targets.append(share[known])
        if not any(map(len, values)):
            raise ConfigError(
                f"online_probe.dense_images: all pixels of the training photographs are void ({classes.void})"
            )
        head = NeighbourHead(torch.cat(values).to(device), torch.cat(targets).to(device), self.k, cosine=True)
        confusion = np.zeros((classes.count, classes.count), np.int64)
        for photograph in test:
            predicted = predict_pixels(
                head,
                photograph.tokens[of].to(device),
                self.view.places(photograph.shown),
                self.view.grid(photograph.shown),
                window,
                photograph.shown,
                (photograph.truth.shape[0], photograph.truth.shape[1]),
            )
            if classes.void < classes.count:
                predicted[classes.void] = -torch.inf
            confusion += count_pixels(photograph.truth.numpy(), predicted.max(0).indices.cpu().numpy(), classes)
        if not confusion.any():
            raise ConfigError(
                f"online_probe.dense_images: all pixels of the validation photographs are void ({classes.void})"
            )
        miou = segmentation_scores(confusion, classes)["miou"]
        assert isinstance(miou, float)
        return miou
