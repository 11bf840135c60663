"""The models under probe, trained and untrained twin, and their features on the images of the run."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, Protocol

import torch
from rich.progress import track
from torch import Tensor

from mae.distributed.rank_zero import is_rank_zero
from mae.distributed.ranks import broadcast_from_rank_zero, gather_to_rank_zero
from mae.errors import CheckpointError, ConfigError
from mae.models.classifier import Classifier, Pool
from mae.models.mae import MaskedAutoencoder
from mae.models.pixels import Pixels
from mae.models.vit import Encoder
from mae.pictures.draw import shown_range, stretch
from mae.probes.feature_cache import FeatureCache, thumbnails_key, weights_fingerprint
from mae.probes.features import Features, Kind, concatenate_by_sample, describe, held_out_noise, losses, thumbnails
from mae.train.precision import choose_float32_products, resolve_precision

Split = Literal["train", "test"]
Model = Encoder | MaskedAutoencoder
FeatureKey = tuple[str, Kind, float | None]  # model, kind of features, mask ratio for losses


class Images(Protocol):
    """Training and test images, as one rank sees them."""

    def has(self, split: Split) -> bool: ...

    def samples(self, split: Split, at_most: int | None) -> Tensor:
        """Returns the numbers of all samples, or of at most so many, ascending."""
        ...

    def labels(self, split: Split, samples: Tensor) -> Tensor:
        """Returns their classes, -1 where unknown."""
        ...

    def class_names(self, *splits: Split) -> list[str]:
        """Returns the names of the classes by label, [] if they are unknown or these parts do not agree on them."""
        ...

    def differing_classes(self, *splits: Split) -> str:
        """Says where these parts number their classes differently, "" if they agree."""
        ...

    def remarks_on_labels(self) -> list[str]:
        """Returns a sentence for each thing about the labels of both parts that may not be meant."""
        ...

    def explain_label(self, split: Split, sample: int) -> str:
        """Says why a sample has no class."""
        ...

    def keys(self, split: Split, samples: Tensor) -> list[str]:
        """Returns the keys of some samples."""
        ...

    def crops(self, split: Split, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Returns centre crops of a few samples, uint8 or uint16 [B, C, H, W], and bool [B]: which could be read."""
        ...

    def explain_unreadable(self, split: Split, sample: int) -> str:
        """Says why a sample cannot be read."""
        ...

    def batches(self, split: Split, samples: Tensor, view: int | None) -> Iterable[dict[str, Any]]:
        """Loads this rank's share, in equally many batches on every rank: images, positions (the samples), labels.

        Samples that cannot be read are missing.
        """
        ...

    def lacks_maps(self, target: Literal["classes", "depth"]) -> str:
        """Says why there are no maps of classes or depth beside the photographs, "" if there are."""
        ...

    def naming(self, split: Split) -> tuple[list[str], int | None]:
        """Returns the names of the classes in label maps, [] if unknown, and the number that stands for none."""
        ...

    def photographs(
        self,
        split: Split,
        samples: Tensor,
        target: Literal["classes", "depth"],
        size: Callable[[int, int], tuple[int, int]],
        unit: float,
    ) -> Iterable[Any]:
        """Loads this rank's share of whole photographs with their maps, equally many on every rank; None for none.

        Each has sample, key, image [C, h, w] of `size`, truth [H, W] of its own size; or reason, why it has neither.
        """
        ...

    def identity(self, split: Split, view: int | None) -> dict[str, Any]:
        """Returns plain values of everything that pixels and labels depend on."""
        ...


class Want(NamedTuple):
    """Features that a probe needs.

    view   number of the augmented pass over the images; None: centre crops
    ratio  mask ratio, for the kind "loss"
    twin   whether the untrained model's are needed too
    """

    split: Split
    kind: Kind
    at_most: int | None = None
    view: int | None = None
    ratio: float | None = None
    twin: bool = True


class ModelsUnderProbe:
    """A trained model, its untrained twin, and their features.

    models      under the names "trained" and "untrained"
    seed        of the untrained model and of all random numbers of a probe
    unreadable  samples of each split that could not be read: no features have them
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
        none = torch.zeros(0, dtype=torch.int64)
        self.unreadable: dict[Split, Tensor] = {"train": none, "test": none}
        choose_float32_products(device)
        self.fingerprints = {name: weights_fingerprint(model) for name, model in models.items()}
        for model in models.values():
            model.to(device).eval()

    def lacks_labels(self, wants: list[Want]) -> str | None:
        """Returns why there are no test images, or no labels of several classes for the images of `wants`, or None."""
        if not self.images.has("test"):
            return "needs test images: set data.val_path"
        for want in dict.fromkeys(want._replace(view=None) for want in wants):
            samples = self._readable(want.split, self.images.samples(want.split, want.at_most))
            labels = self.images.labels(want.split, samples)
            if len(lacking := samples[labels < 0]):
                reason = self.images.explain_label(want.split, int(lacking[0]))
                return f"needs labels, and some images have none ({reason})"
            if want.split == "train" and (labels == labels[0]).all():
                return (
                    f"needs training images of several classes, and all {len(labels):,} have the label {int(labels[0])}"
                )
        splits: dict[Split, None] = dict.fromkeys(want.split for want in wants)
        if differing := self.images.differing_classes(*splits):
            return f"needs labels that mean the same everywhere: {differing}"
        return None

    def autocast(self) -> torch.autocast:
        """Returns a context of the precision in which the models compute."""
        return torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision != torch.float32)

    def features(self, name: str, want: Want) -> Features:
        """Returns features that `collect` has found, on rank 0: for each model and view of the same images."""
        found = self.found[name, want]
        return found.take(self._readable(want.split, found.samples))

    def crops(self, split: Split, at_most: int, features: Features) -> tuple[Tensor, Tensor]:
        """Returns centre crops of at most so many images, evenly spread, and their numbers: of those in `features`."""
        spread = self._readable(split, self.images.samples(split, at_most))
        samples = spread if len(spread) else features.samples[:at_most]
        crops, there = self.images.crops(split, samples)
        return crops[there], samples[there]

    def unreadable_keys(self, wants: Iterable[Want]) -> dict[Split, list[str]]:
        """Returns the keys of the images in these wants that could not be read, for each split."""
        wants = list(wants)
        return {
            split: self.images.keys(split, lost[torch.isin(lost, self.asked(split, wants))])
            for split, lost in self.unreadable.items()
            if any(want.split == split for want in wants)
        }

    def asked(self, split: Split, wants: Iterable[Want]) -> Tensor:
        """Returns the samples of a split that these wants ask for."""
        asked = [self.images.samples(split, want.at_most) for want in wants if want.split == split]
        return torch.cat(asked).unique()

    def _readable(self, split: Split, samples: Tensor) -> Tensor:
        lost = self.unreadable[split]
        return samples[~torch.isin(samples, lost)] if len(lost) else samples

    def collect(self, wants: list[Want]) -> None:
        """Finds features in the cache, and extracts all that are missing in one pass over the images of each split.

        Every rank has to call it; rank 0 gets the features. Raises ConfigError if no image of a want can be read.
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
                if features is None or not self._note_unreadable(want.split, samples, features, try_again=True):
                    missing.append((name, want))
                else:
                    refuse_not_finite(name, features)  # kept by a version that did not look
                    self.found[name, want] = features
        return missing

    def _note_unreadable(self, split: Split, asked: Tensor, found: Features, try_again: bool = False) -> bool:
        """Notes the samples that have no features. Returns False if, tried again, one of them can be read by now."""
        lost = asked[~torch.isin(asked, found.samples)]
        if len(lost) == len(asked):
            first, why = self.images.keys(split, lost[:1])[0], self.images.explain_unreadable(split, int(lost[0]))
            raise ConfigError(f"none of the {len(asked):,} {split} images can be read; the first is {first}: {why}")
        if try_again and len(lost) and self.images.crops(split, lost)[1].any():
            return False
        self.unreadable[split] = torch.cat([self.unreadable[split], lost]).unique()
        return True

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
        """Extracts features in one pass over the images, gathers them batch by batch, and keeps them in the cache."""
        wanted: dict[FeatureKey, Tensor] = {}
        for name, want in missing:
            key: FeatureKey = name, want.kind, want.ratio
            samples = self.images.samples(split, want.at_most)
            wanted[key] = torch.cat([wanted.get(key, samples), samples]).unique()
        rows: dict[FeatureKey, list[Features]] = {key: [] for key in wanted}
        batches = self.images.batches(split, torch.cat(list(wanted.values())).unique(), view)
        for batch in track(batches, f"features of {split} images", transient=True, disable=not is_rank_zero()):
            for part in gather_to_rank_zero(self._of_batch(batch, wanted)):
                for key, features in part.items():
                    rows[key].append(features)
        if not is_rank_zero():
            return
        whole = {key: concatenate_by_sample(parts) for key, parts in rows.items()}
        for (name, kind, ratio), features in whole.items():
            asked = wanted[name, kind, ratio]
            self._note_unreadable(split, asked, features)
            lost = asked[~torch.isin(asked, features.samples)]
            self.cache.keep(self._key(name, Want(split, kind, None, view, ratio)), features, lost)
        for name, want in missing:
            samples = self.images.samples(split, want.at_most)
            self.found[name, want] = whole[name, want.kind, want.ratio].take(samples)

    @torch.inference_mode()
    def _of_batch(self, batch: dict[str, Any], wanted: dict[FeatureKey, Tensor]) -> dict[FeatureKey, Features]:
        """Computes the features of a batch; each image is encoded once for all kinds that come from the latent."""
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
                    unit = self.pixels.unit
                    drawn = [stretch(unit(one), shown_range(one)) for one in batch["images"][rows]]
                    values = thumbnails(torch.stack(drawn))
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
                        values = describe(some, model.config.class_tokens, kind)
            found[name, kind, ratio] = Features(samples[rows], labels[rows], values.cpu())
            refuse_not_finite(name, found[name, kind, ratio])
        return found


def refuse_not_finite(name: str, features: Features) -> None:
    """Raises CheckpointError if features are infinite or NaN: no probe measures anything on them."""
    for rows in zip(features.samples.split(1024), features.values.split(1024), strict=True):
        samples, values = rows
        finite = values.isfinite().flatten(1).all(1) if values.ndim > 1 else values.isfinite()
        if not finite.all():
            raise CheckpointError(
                f"features of the {name} encoder are not finite, first those of image {int(samples[~finite][0])}: "
                "nothing is measured. Its weights hold NaN or overflow; take an earlier checkpoint"
            )
