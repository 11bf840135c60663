"""Tokens of whole photographs by a frozen encoder, and by none: position and mean colour of each patch.

1 read     photographs with their maps, each rank its share
2 encode   their windows, one photograph at a time, so that the result does not depend on the number of ranks
3 thin     of a training photograph some tokens, drawn from (seed, number of the sample)
4 gather   rows of all photographs on rank 0; those of encoders are kept in the feature cache
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange, reduce
from rich.progress import track
from torch import Tensor, nn

from mae.distributed.rank_zero import is_rank_zero
from mae.distributed.ranks import broadcast_from_rank_zero, gather_to_rank_zero
from mae.models.resample import at_image_size
from mae.models.vit import Encoder
from mae.probes.dense_heads import Target
from mae.probes.features import Features, concatenate_by_sample
from mae.probes.models_under_probe import ModelsUnderProbe, Split, refuse_not_finite
from mae.probes.windows import Size, crop_windows, cut_windows, shown_size

FLOOR = "position and colour"
SIZES = 8  # of images for which resampled encoders are held


@dataclass(frozen=True)
class View:
    """How photographs are shown to the encoder.

    size    see `shown_size`;  window  None: the whole photograph at once
    layers  numbers of blocks from 1, or from the end: -1 is the last; each behind the final norm
    """

    size: int | Size | None
    window: Size | None
    layers: tuple[int, ...]
    patch: int

    def shown(self, height: int, width: int) -> Size:
        return shown_size((height, width), self.size, self.patch, self.window)

    def places(self, shown: Size) -> list[tuple[int, int]]:
        return cut_windows(shown, self.window)

    def grid(self, shown: Size) -> Size:
        """Returns rows and columns of the tokens of a window."""
        height, width = self.window or shown
        return height // self.patch, width // self.patch

    def tokens(self, shown: Size) -> int:
        """Returns how many patch tokens all windows of a photograph have."""
        return len(self.places(shown)) * math.prod(self.grid(shown))


class Mapped(NamedTuple):
    """A photograph that was read.

    shown  its size before the encoder;  truth  its map, at the size of the photograph
    image  uint8 or uint16 [C, *shown], of those in the picture
    """

    sample: int
    shown: Size
    truth: Tensor
    image: Tensor | None = None


@dataclass
class TokenMaps:
    """Photographs of one split with their tokens.

    photographs  in the order of their samples
    tokens       model -> rows of all photographs, in their order: of a test photograph for each window the mean class
                 token, then the patches; of a training photograph `drawn` patches, each with its mean class token
    left_out     (key, reason) of the photographs that have no map or cannot be read
    asked        number of photographs that were asked for
    """

    photographs: list[Mapped] = field(default_factory=list)
    tokens: dict[str, Features] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    asked: int = 0

    def rows(self, name: str) -> list[Tensor]:
        """Returns the rows of each photograph, [rows, D]."""
        found = self.tokens[name]
        samples = torch.tensor([photograph.sample for photograph in self.photographs])
        ends = torch.searchsorted(found.samples, samples, right=True)
        starts = torch.searchsorted(found.samples, samples)
        return [found.values[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


def encode_windows(encoder: Encoder, images: Tensor, layers: tuple[int, ...]) -> Tensor:
    """Encodes windows of the encoder's size: normalised [W, C, h, w] -> [W, 1 + N, D * len(layers)], half precision.

    The first row is the mean of the class tokens, zero if there are none. Each layer goes through the final norm.
    """
    depth, first = encoder.config.depth, encoder.config.class_tokens
    wanted = [layer % depth if layer < 0 else layer - 1 for layer in layers]
    outputs: dict[int, Tensor] = {}

    def keep(number: int) -> Callable[..., None]:
        def hook(_block: nn.Module, _inputs: Any, output: Tensor) -> None:
            outputs[number] = encoder.norm(output)

        return hook

    hooks = [encoder.blocks[number].register_forward_hook(keep(number)) for number in {*wanted} - {depth - 1}]
    try:
        outputs[depth - 1] = encoder.encode(images)
    finally:
        for hook in hooks:
            hook.remove()
    latent = torch.cat([outputs[number] for number in wanted], dim=-1).float()
    pooled = latent[:, :first].mean(1, keepdim=True) if first else torch.zeros_like(latent[:, :1])
    return torch.cat([pooled, latent[:, first:]], dim=1).half()


def position_and_colour(images: Tensor, places: list[tuple[int, int]], shown: Size, patch: int) -> Tensor:
    """Describes patches without an encoder: normalised windows [W, C, h, w] -> [W, 1 + N, 2 + C], half precision.

    Row and column of the patch in the photograph, 0 to 1, then its mean colour; a first row of zeros.
    """
    colour = reduce(images, "w c (h p) (v q) -> w (h v) c", "mean", p=patch, q=patch)
    rows, columns = (torch.arange(side // patch) * patch + patch / 2 for side in images.shape[-2:])
    centres = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
    positions = (centres + torch.tensor(places)[:, None]) / torch.tensor(shown)
    described = torch.cat([positions, colour.cpu()], dim=-1)
    return torch.cat([torch.zeros_like(described[:, :1]), described], dim=1).half()


def drawn_rows(seed: int, sample: int, tokens: int, count: int) -> Tensor:
    """Returns which tokens of a photograph are taken for training, ascending: `count` of them, or all."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + sample) % 2**63)
    return torch.randperm(tokens, generator=generator)[:count].sort().values


def thin(rows: Tensor, chosen: Tensor) -> Tensor:
    """Returns chosen patches, each with the class token of its window behind it: [W, 1 + N, D] -> [n, 2 D]."""
    patches = rows[:, 1:]
    pooled = rows[:, :1].expand_as(patches)
    return rearrange(torch.cat([patches, pooled], -1), "w n d -> (w n) d")[chosen]


class Extraction:
    """Reads the photographs of a split, and encodes them for the models whose tokens are not kept yet."""

    def __init__(self, probed: ModelsUnderProbe, view: View, names: list[str], target: Target, unit: float) -> None:
        self.probed, self.view, self.names, self.unit = probed, view, names, unit
        self.target: Target = target
        self.sized = lru_cache(SIZES)(self._at_size)

    def _at_size(self, name: str, size: Size) -> Encoder:
        # The copy has fused attention, which for whole photographs is the faster one on CPUs too.
        return at_image_size(self.probed.models[name], size).eval()

    def collect(
        self, split: Split, at_most: int | None, drawn: int | None, seed: int, pictured: Collection[int] = ()
    ) -> TokenMaps:
        """Returns the photographs and tokens of a split on rank 0, elsewhere nothing. A collective.

        drawn     tokens that are taken of each photograph, by this seed; None: all, in windows
        pictured  samples whose pixels are kept
        """
        probed = self.probed
        samples = probed.images.samples(split, at_most)
        keys = {name: self._key(name, split, samples, drawn, seed) for name in self.names}
        found = {name: probed.cache.find(key, samples) for name, key in keys.items()} if is_rank_zero() else {}
        # One that could not be read before may be there by now.
        kept = {
            name: features
            for name, features in found.items()
            if features is not None and len(features.samples.unique_consecutive()) == len(samples)
        }
        missing = broadcast_from_rank_zero([name for name in self.names if name not in kept])
        maps = TokenMaps(tokens=dict(kept), asked=len(samples))
        rows: dict[str, list[Features]] = {name: [] for name in [*missing, FLOOR]}
        photographs = probed.images.photographs(split, samples, self.target, self.view.shown, self.unit)
        total = -(-len(samples) // max(1, _ranks()))
        text = f"tokens of {split} photographs"
        for photograph in track(photographs, text, total, transient=True, disable=not is_rank_zero()):
            part = photograph and self._of_photograph(photograph, missing, drawn, seed, pictured)
            for each in gather_to_rank_zero(part):
                if each is None:
                    continue
                mapped, tokens, key, reason = each
                if reason:
                    maps.left_out.append((key, reason))
                    continue
                maps.photographs.append(mapped)
                for name, values in tokens.items():
                    numbers = torch.full((len(values),), mapped.sample)
                    rows[name].append(Features(numbers, torch.zeros_like(numbers), values))
        if not is_rank_zero():
            return maps
        maps.photographs.sort(key=lambda photograph: photograph.sample)
        readable = torch.tensor([photograph.sample for photograph in maps.photographs], dtype=torch.int64)
        for name, parts in rows.items():
            maps.tokens[name] = concatenate_by_sample(parts)
            if name in keys and parts:
                refuse_not_finite(name, maps.tokens[name])
                lost = samples[~torch.isin(samples, readable)]
                probed.cache.keep(keys[name], maps.tokens[name], lost)
        for name in kept:
            maps.tokens[name] = kept[name].take(readable)
        return maps

    def _key(self, name: str, split: Split, samples: Tensor, drawn: int | None, seed: int) -> dict[str, Any]:
        view = self.view
        taken = "all" if drawn is None else f"{drawn} drawn by {seed}"
        probed = self.probed
        return {
            "weights": probed.fingerprints[name],
            "model": probed.models[name].config.model_dump(mode="json"),
            "kind": f"dense {view.size} {view.window} {view.layers} {taken} of {len(samples)}",
            "images": probed.images.identity(split, None),
            "precision": f"{probed.precision} {probed.device.type}",
        }

    @torch.inference_mode()
    def _of_photograph(
        self, photograph: Any, names: list[str], drawn: int | None, seed: int, pictured: Collection[int]
    ) -> tuple[Mapped, dict[str, Tensor], str, str]:
        if photograph.reason:
            nothing = Mapped(photograph.sample, (0, 0), torch.zeros(0))
            return nothing, {}, photograph.key, photograph.reason
        image, truth = torch.from_numpy(photograph.image), as_tensor(photograph.truth)
        shown: Size = (image.shape[-2], image.shape[-1])
        places, window = self.view.places(shown), self.view.window or shown
        pixels = self.probed.pixels.normalise(image[None].to(self.probed.device))[0]
        windows = crop_windows(pixels, places, window)
        tokens = {FLOOR: position_and_colour(windows, places, shown, self.view.patch)}
        for name in names:
            with self.probed.autocast():
                tokens[name] = encode_windows(self.sized(name, window), windows, self.view.layers).cpu()
        if drawn is None:
            found = {name: rows.flatten(0, 1) for name, rows in tokens.items()}
        else:
            chosen = drawn_rows(seed, photograph.sample, self.view.tokens(shown), drawn)
            found = {name: thin(rows, chosen) for name, rows in tokens.items()}
        kept = image if photograph.sample in pictured else None
        return Mapped(photograph.sample, shown, truth, kept), found, photograph.key, ""


def as_tensor(truth: np.ndarray) -> Tensor:
    """Returns a map as a tensor of a type that torch computes with: classes of 16 bits as int32."""
    return torch.from_numpy(truth.astype(np.int32) if truth.dtype == np.uint16 else truth)


def _ranks() -> int:
    dist = torch.distributed
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
