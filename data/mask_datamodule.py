"""Lightning data module of segmentation: batches of whole photographs with instance masks."""

from typing import Any

from data.config import DataConfig
from data.datamodule import ShardDataModule
from data.errors import DataError
from data.images.masks import require_pycocotools
from data.index.index import ShardIndex
from data.loader.mask_dataset import Frame, MaskDataset


class MaskDataModule(ShardDataModule):
    """A ShardDataModule for shards with an SA-1B record beside each image; its batches are those of MaskDataset.

    masks_per_image  None: all of them at the resolution of the photograph, one photograph in a batch; for scores
    run              seed, global_batch, micro_batch and bad_samples of a ShardDataModule

    Photographs are shown whole: the settings of crops (scale, val_crop, decode) have no effect.
    Raises DataError also if pycocotools or the records are missing, in mode stream, and with several views or 16 bits.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        image_size: int,
        masks_per_image: int | None,
        min_area: float = 0.0,
        **run: Any,
    ):
        require_pycocotools()
        if config.mode == "stream" or config.views_per_image > 1 or config.bits != 8:
            raise DataError(
                f"masks are read from indexed shards, one view per image, 8 bits; got data.mode={config.mode}, "
                f"data.views_per_image={config.views_per_image}, data.bits={config.bits}. Leave them out."
            )
        super().__init__(config, image_size=(image_size, image_size), channels=3, **run)
        for index in filter(None, (self.train_index, self.val_index)):
            if not any(member.name.lower().endswith(".json") for member in index.members(0)):
                raise DataError(
                    f"{index.shards[0]} has no .json with masks beside its images. Give shards of SA-1B's format, or "
                    "pack COCO annotations with `python -m data.pack IMAGES OUT --masks instances.json`."
                )
        self.frame = Frame(image_size, masks_per_image, flip=config.flip, min_area=min_area)

    def dataset(self, index: ShardIndex, seed: int | None = None, replace: bool = True) -> MaskDataset:
        """Returns the data set that loads batches from an index: masks and mirroring drawn from `seed`, if given."""
        return MaskDataset(index, self.frame, seed, replace)
