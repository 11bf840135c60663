"""Settings of the model: architecture and objective, frozen and validated."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

# (height, width) in pixels; one number stands for a square.
ImageSize = Annotated[tuple[int, int], BeforeValidator(lambda size: (size, size) if isinstance(size, int) else size)]

FORMER = ("class_token",)  # settings of earlier versions that are still read


class MAEConfig(BaseModel, frozen=True, extra="forbid"):
    """Architecture and objective. Lengths in pixels, widths in channels.

    The defaults are ViT-B/16 with the decoder of the paper (He et al. 2022, section 4).

    decoder    "self": visible and hidden patches attend to each other; "cross": hidden patches attend to visible ones
               only (Fu et al. 2024), so that a part of them can be predicted
    predicted  share of the hidden patches that a cross decoder predicts in training
    masking    "random" patches, a "block" of rectangles, or a regular "grid"
    mask_cell  side in patches of the cells that random masking hides or leaves whole (4: Yang et al. 2025)
    """

    image_size: ImageSize = (224, 224)
    patch_size: int = Field(16, ge=1)
    in_channels: int = Field(3, ge=1)

    width: int = Field(768, ge=4)
    depth: int = Field(12, ge=1)
    num_heads: int = Field(12, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    class_tokens: int = Field(1, ge=0)
    positions: Literal["sincos", "learned"] = "sincos"

    decoder_width: int = Field(512, ge=4)
    decoder_depth: int = Field(8, ge=1)
    decoder_num_heads: int = Field(16, ge=1)

    decoder: Literal["self", "cross"] = "self"
    predicted: float = Field(1.0, gt=0, le=1)

    mask_ratio: float = Field(0.75, gt=0, lt=1)
    masking: Literal["random", "block", "grid"] = "random"
    mask_cell: int = Field(1, ge=1)
    norm_pix: bool = True

    @model_validator(mode="before")
    @classmethod
    def _class_tokens_are_counted(cls, settings: Any) -> Any:
        # Recipes, checkpoints and exports older than the number have class_token: true or false.
        if isinstance(settings, dict) and "class_token" in settings:
            others = {name: value for name, value in settings.items() if name != "class_token"}
            return {"class_tokens": int(settings["class_token"])} | others
        return settings

    @model_validator(mode="after")
    def _fits(self) -> "MAEConfig":
        require_multiple_of_patch(self.image_size, self.patch_size)
        if self.mask_cell > 1:
            self._require_cells()
        for name, width, heads in (
            ("width", self.width, self.num_heads),
            ("decoder_width", self.decoder_width, self.decoder_num_heads),
        ):
            if width % heads:
                raise ValueError(f"{name}={width} cannot be split over {heads} heads: choose a divisor of {width}")
            if self.positions == "sincos" and width % 4:
                raise ValueError(f"{name}={width} is not a multiple of 4, which sine-cosine positions need")
        if self.norm_pix and self.patch_values == 1:
            raise ValueError("norm_pix=true with one value per patch, which has no variance: set norm_pix=false")
        if not 0 < self.visible < self.patches:
            raise ValueError(
                f"mask_ratio={self.mask_ratio} leaves {self.visible} of {self.patches} patches visible: at least one "
                f"{'patch' if self.mask_cell == 1 else 'cell'} has to be visible and one hidden. Change mask_ratio, "
                f"{'' if self.mask_cell == 1 else 'mask_cell, '}patch_size or image_size"
            )
        if self.predicted < 1 and self.decoder == "self":
            raise ValueError(
                f"predicted={self.predicted} is not available with decoder=self, whose hidden patches attend to each "
                "other, so that none can be left out: set decoder=cross or predicted=1"
            )
        if not self.predictions:
            raise ValueError(
                f"predicted={self.predicted} of {self.patches - self.visible} hidden patches is none: raise predicted"
            )
        return self

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row of the image, (h, w)."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def patches(self) -> int:
        """N, the number of patches of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def visible(self) -> int:
        """K, the number of visible patches, which the encoder gets: int(cells * (1 - mask_ratio)) whole cells."""
        cell = self.mask_cell**2
        return visible_patches(self.patches // cell, self.mask_ratio) * cell

    @property
    def predictions(self) -> int:
        """Q, the number of hidden patches that are predicted in training."""
        return round((self.patches - self.visible) * self.predicted)

    @property
    def patch_values(self) -> int:
        """P = p*p*C, the number of values in a patch."""
        return self.patch_size**2 * self.in_channels

    def _require_cells(self) -> None:
        cell = self.mask_cell
        if self.masking != "random":
            raise ValueError(
                f"mask_cell={cell} is for masking=random, and masking={self.masking} draws shapes of its own: "
                "set mask_cell=1"
            )
        for side, patches in zip(("height", "width"), self.grid, strict=True):
            if patches % cell:
                below, unit = patches // cell * cell, self.patch_size
                sizes = [size * unit for size in (below, below + cell) if size]
                raise ValueError(
                    f"image_size {side} {patches * unit} is {patches} patches, which cells of mask_cell={cell} do not "
                    f"divide. Nearest sizes: {' or '.join(map(str, sizes))}"
                )


def require_multiple_of_patch(image_size: tuple[int, int], patch_size: int) -> None:
    """Raises ValueError if a side of the image, (height, width), is not a multiple of the patch size."""
    for side, length in zip(("height", "width"), image_size, strict=True):
        if length < 1 or length % patch_size:
            below = length // patch_size * patch_size
            nearest = f"{below} or {below + patch_size}" if below else f"{patch_size}"
            raise ValueError(
                f"image_size {side} {length} is not a multiple of patch_size={patch_size}: the grid would cut through "
                f"a patch. Nearest sizes: {nearest}"
            )


def visible_patches(patches: int, mask_ratio: float) -> int:
    """Returns K, the number of visible patches: int(N * (1 - mask_ratio)) (He et al. 2022, section 3)."""
    return int(patches * (1 - mask_ratio))
