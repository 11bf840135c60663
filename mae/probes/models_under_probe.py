"""What is probed: a trained model beside the same model untrained, on the images of its run."""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, Protocol

import torch
from rich.progress import track
from torch import Tensor

from mae.distributed.rank_zero import is_rank_zero
from mae.distributed.ranks import broadcast_from_rank_zero, gather_to_rank_zero
from mae.models.classifier import Classifier, Pool
from mae.models.mae import MaskedAutoencoder
from mae.models.pixels import Pixels
from mae.models.vit import Encoder, choose_attention
from mae.probes.feature_cache import FeatureCache, thumbnails_key, weights_fingerprint
from mae.probes.features import Features, Kind, describe, held_out_noise, losses, merged, thumbnails
from mae.train.precision import choose_float32_products, resolve_precision

Split = Literal["train", "test"]
Model = Encoder | MaskedAutoencoder
Which = tuple[str, Kind, float | None]  # model, kind of features, share of hidden patches for losses


class Images(Protocol):
    """The training and test images, on whichever rank this is."""

    def has(self, split: Split) -> bool: ...

    def samples(self, split: Split, at_most: int | None) -> Tensor:
        """The numbers of all samples, or of at most so many, ascending."""
        ...

    def labels(self, split: Split, samples: Tensor) -> Tensor:
        """Their classes, -1 where unknown."""
        ...

    def crops(self, split: Split, samples: Tensor) -> Tensor:
        """Centre crops of a few samples, uint8 or uint16 [B, C, H, W]."""
        ...

    def batches(self, split: Split, samples: Tensor, view: int | None) -> Iterable[dict[str, Any]]:
        """This rank's share in equally many batches on every rank: images, positions (the samples), labels."""
        ...

    def identity(self, split: Split, view: int | None) -> dict[str, Any]:
        """Plain values of everything that the pixels depend on."""
        ...


class Want(NamedTuple):
    """Features that a probe needs.

    view   number of the augmented pass over the images; None for centre crops
    ratio  share of hidden patches, for the kind "loss"
    twin   of the untrained model too
    """

    split: Split
    kind: Kind
    at_most: int | None = None
    view: int | None = None
    ratio: float | None = None
    twin: bool = True


class Subject:
    """A trained model, its untrained twin, and their features.

    models  "trained" and "untrained"
    seed    of the untrained model and of what a probe draws
    """

    def __init__(
        self,
        models: dict[str, Model],
        images: Images,
        pixels: Pixels,
        cache: FeatureCache,
        *,
        pool: Pool,
        seed: int,
        device: torch.device,
    ) -> None:
        self.models, self.images, self.cache = models, images, cache
        self.pool: Pool = pool
        self.seed, self.device = seed, device
        self.pixels = pixels.to(device)
        self.precision = torch.bfloat16 if resolve_precision("auto") == "bf16-mixed" else torch.float32
        self.found: dict[tuple[str, Want], Features] = {}
        choose_float32_products(device)
        self.fingerprints = {name: weights_fingerprint(model) for name, model in models.items()}
        for model in models.values():
            model.to(device).eval()
            choose_attention(model.blocks, device=device)
            if isinstance(model, MaskedAutoencoder):
                choose_attention(model.decoder_blocks, device=device)

    def lacks_labels(self, *wants: Want) -> str | None:
        """Why a probe that needs labelled training and test images cannot be had."""
        if not self.images.has("test"):
            return "needs test images: set data.val_path"
        for want in wants:
            samples = self.images.samples(want.split, want.at_most)
            if (self.images.labels(want.split, samples) < 0).any():
                return "needs labels, and some images have none (no .cls in the shards)"
        return None

    def autocast(self) -> torch.autocast:
        """The precision in which the models compute."""
        return torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision != torch.float32)

    def features(self, name: str, want: Want) -> Features:
        """What `collect` has found, on rank 0."""
        return self.found[name, want]

    def collect(self, wants: list[Want]) -> None:
        """Finds the features in the cache, or extracts them: one pass over the images for all that is wanted of them.

        Every rank has to call it; rank 0 gets the features.
        """
        passes: dict[tuple[Split, int | None], None] = dict.fromkeys((want.split, want.view) for want in wants)
        for split, view in passes:
            group = [want for want in dict.fromkeys(wants) if (want.split, want.view) == (split, view)]
            missing: list[tuple[str, Want]] = broadcast_from_rank_zero(self._missing(group) if is_rank_zero() else None)
            if missing:
                self._extract(split, view, missing)

    def _missing(self, wants: list[Want]) -> list[tuple[str, Want]]:
        missing = []
        for want in wants:
            for name in self.models if want.twin else ("trained",):
                samples = self.images.samples(want.split, want.at_most)
                features = self.cache.find(self._key(name, want), samples)
                if features is None:
                    missing.append((name, want))
                else:
                    self.found[name, want] = features
        return missing

    def _key(self, name: str, want: Want) -> dict[str, Any]:
        images = self.images.identity(want.split, want.view)
        if want.kind == "thumbnails":
            return thumbnails_key(images)
        return {
            "weights": self.fingerprints[name],
            "model": self.models[name].config.model_dump(mode="json"),
            "kind": want.kind if want.ratio is None else f"{want.kind} at {want.ratio}",
            "images": images,
            "precision": f"{self.precision} {self.device.type}",
        }

    def _extract(self, split: Split, view: int | None, missing: list[tuple[str, Want]]) -> None:
        """One pass; what is gathered batch by batch goes to the cache and to those who want it."""
        wanted: dict[Which, Tensor] = {}
        for name, want in missing:
            which: Which = name, want.kind, want.ratio
            samples = self.images.samples(split, want.at_most)
            wanted[which] = torch.cat([wanted.get(which, samples), samples]).unique()
        rows: dict[Which, list[Features]] = {which: [] for which in wanted}
        batches = self.images.batches(split, torch.cat(list(wanted.values())).unique(), view)
        for batch in track(batches, f"features of {split} images", transient=True, disable=not is_rank_zero()):
            for part in gather_to_rank_zero(self._of_batch(batch, wanted)):
                for which, features in part.items():
                    rows[which].append(features)
        if not is_rank_zero():
            return
        whole = {which: merged(parts) for which, parts in rows.items()}
        for (name, kind, ratio), features in whole.items():
            self.cache.keep(self._key(name, Want(split, kind, None, view, ratio)), features)
        for name, want in missing:
            samples = self.images.samples(split, want.at_most)
            self.found[name, want] = whole[name, want.kind, want.ratio].take(samples)

    @torch.inference_mode()
    def _of_batch(self, batch: dict[str, Any], wanted: dict[Which, Tensor]) -> dict[Which, Features]:
        """The rows that are wanted of a batch; each image is encoded once for all kinds that come from the latent."""
        if not len(batch["images"]):  # more ranks than samples
            return {}
        samples, labels = batch["positions"], batch["labels"]
        images = self.pixels.normalise(batch["images"].to(self.device))
        latents: dict[str, Tensor] = {}
        found = {}
        for (name, kind, ratio), chosen in wanted.items():
            model, rows = self.models[name], torch.isin(samples, chosen)
            if not rows.any():
                continue
            on_device = rows.to(self.device)
            with self.autocast():
                if kind == "thumbnails":
                    values = thumbnails(self.pixels.unit(batch["images"][rows]))
                elif ratio is not None:
                    assert isinstance(model, MaskedAutoencoder)
                    noise = held_out_noise(samples[rows].to(self.device), model.config)
                    values = losses(model, images[on_device], noise, ratio)
                else:
                    if name not in latents:
                        latents[name] = model.encode(images)
                    some = latents[name][on_device]
                    if kind == "scores":
                        assert isinstance(model, Classifier)
                        values = model.scores(some).float()
                    else:
                        values = describe(some, model.config.class_token, kind)
            found[name, kind, ratio] = Features(samples[rows], labels[rows], values.cpu())
        return found
