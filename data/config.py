"""Settings of the data (`data=`)."""

from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from data.index.samples import normalise_extension
from data.storage.cache import ShardCache
from data.storage.credentials import hide_all

# Policies of timm whose operations grow with the magnitude: some of the others erase an image at low magnitudes.
POLICY = r"^rand(-(m|n)\d+|-(p|mstd)\d+(\.\d+)?)*-inc1$"


class SamplingRule(BaseModel, frozen=True, extra="forbid"):
    """Which training images an epoch shows, by the table `sampling`; see data/index/sample_table.py."""

    min_size: int | None = Field(default=None, ge=1)  # pixels of the shorter side
    min_entropy: float | None = Field(default=None, gt=0)  # bits, of the colours
    unique: bool = False  # one of each group of near-duplicates
    probability: Literal["loss"] | None = None  # with which an image is shown in an epoch: its loss, at most 1; None: 1

    @property
    def given(self) -> dict[str, Any]:
        return self.model_dump(exclude_defaults=True)


class DataConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of the data: which images are read, and how they are cropped.

    `path` takes precedence over `source`; without `val_path` the val or test part of `path` is used, if it has one.
    """

    source: Literal["digits", "placed_digits", "photos"] | None = None  # built in, packed into `root` on first use
    root: str = "datasets"
    path: str | list[str] | None = None  # a folder, a glob, a list, URLs; of a folder with parts the train part
    val_path: str | list[str] | None = None
    mode: Literal["index", "stream"] = "index"  # stream: for what cannot be indexed, see data/loader/streaming.py
    samples: int | None = Field(default=None, ge=1)  # in an epoch, for mode stream only
    image: str | None = Field(default=None, pattern=r"^[^/\s]+$")  # extension of the image, see data/index/samples.py
    label_maps: str | None = Field(default=None, pattern=r"^[^/\s]+$")  # of maps with the class of each pixel
    depth_maps: str | None = Field(default=None, pattern=r"^[^/\s]+$")  # of maps with its depth
    cache: str | None = None  # folder on a local disk for copies of remote shards; None: see data/storage/cache.py
    cache_gb: float | None = Field(default=None, gt=0)  # 10^9 bytes of copies; None: as much as the disk holds
    workers: int = Field(default=2, ge=0)
    sampling: str | None = None  # table of the training images (.npy), from which `rule` chooses anew in each epoch
    rule: SamplingRule = SamplingRule()
    weights: list[float] | None = None  # share of every global batch that each entry of `path` gets
    window: int = Field(default=16, ge=1)  # shards that are mixed at a time
    lanes: int = Field(default=1, ge=1)  # sequences of shards side by side, best one per node: see data/order/order.py
    scale: tuple[float, float] = (0.2, 1.0)  # share of the image's area that a random crop keeps
    flip: bool = True
    rand_augment: str | None = Field(default=None, pattern=POLICY)  # timm's notation: rand-m9-mstd0.5-inc1
    views_per_image: int = Field(default=1, ge=1)  # repeated augmentation: random crops of one decoded image
    decode: Literal["fast", "exact"] = "fast"  # fast: large JPEGs at 1/2, 1/4, 1/8 where the crop is far larger
    bits: Literal[8, 16] = 8  # of the values that reach the device
    max_bad_fraction: float = Field(default=1e-3, ge=0, le=1)  # share of bad samples above which the run stops
    val_crop: float = Field(default=1.0, gt=0, le=1)  # share of the shorter side that the centre crop keeps
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @field_validator("image", "label_maps", "depth_maps", mode="before")
    @classmethod
    def _normalise_extension(cls, extension: Any) -> Any:
        return normalise_extension(extension) if isinstance(extension, str) else extension

    @field_validator("path", "val_path")
    @classmethod
    def _hide_credentials(cls, path: str | list[str] | None) -> str | list[str] | None:
        return hide_all(path)

    @model_validator(mode="after")
    def _consistent(self) -> "DataConfig":
        if self.path in ("", []) or self.val_path in ("", []):
            raise ValueError("path and val_path cannot be empty: give shards, or null")
        if self.sampling is not None and (self.mode == "stream" or self.samples is not None):
            raise ValueError(
                f"sampling={self.sampling} is not available for mode=stream, whose samples have no numbers, nor with "
                "samples, which follows from the table. Leave it out"
            )
        if self.sampling is not None and not self.rule.given:
            raise ValueError(
                f"sampling={self.sampling} has no rule, and would choose every image. Set rule.min_size, "
                "rule.min_entropy, rule.unique=true or rule.probability=loss, or leave it out"
            )
        if self.sampling is None and self.rule.given:
            name, value = next(iter(self.rule.given.items()))
            raise ValueError(
                f"rule.{name}={str(value).lower()} has no table to choose by. Set data.sampling to one of eval.py "
                "probe=losses, or leave it out"
            )
        if (self.mode == "stream") != (self.samples is not None):
            raise ValueError("mode=stream and samples go together: a stream has no length. Set both or neither of them")
        if self.mode == "stream" and not self.path:
            raise ValueError("mode=stream has no path. Set data.path to commands (pipe:…) or URLs")
        if self.mode == "stream" and (self.weights or self.views_per_image > 1):
            raise ValueError("weights and views_per_image are not available for mode=stream. Leave them out")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale={list(self.scale)} has to be two rising shares of the area, 0 < low <= high <= 1")
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"mean has {len(self.mean)} channels and std {len(self.std)}. Give one of each per channel"
            )
        if self.weights is not None and (
            not isinstance(self.path, list) or len(self.weights) != len(self.path) or min(self.weights) <= 0
        ):
            raise ValueError(
                f"weights={self.weights} do not fit path={self.path}: give path a list, and each entry a weight above 0"
            )
        if self.rand_augment is not None and (len(self.mean) != 3 or self.bits != 8):
            raise ValueError(
                f"rand_augment={self.rand_augment} is for three channels of 8 bits, and these are {len(self.mean)} of "
                f"{self.bits}. Set rand_augment=null"
            )
        if self.image is not None and self.image in self.maps:
            raise ValueError(f"image={self.image} is declared to be a map. Give the image another extension, or null")
        if min(self.std, default=0) <= 0:
            raise ValueError(f"std={list(self.std)} has to be positive in each channel")
        return self

    @property
    def named(self) -> bool:
        """True if the settings say which images to read."""
        return bool(self.path or self.source)

    @property
    def maps(self) -> tuple[str, ...]:
        """Extensions of the members that are maps beside an image, and no images."""
        return tuple(name for name in (self.label_maps, self.depth_maps) if name is not None)

    @property
    def shard_cache(self) -> ShardCache:
        return ShardCache(self.cache, self.cache_gb and self.cache_gb * 1e9)
