"""Lightning data module of whole photographs in SAM's square frame, without masks."""

from typing import Any

from data.config import DataConfig
from data.datamodule import ShardDataModule
from data.errors import DataError
from data.index.index import ShardIndex
from data.loader.photograph_dataset import PhotographDataset


class PhotographDataModule(ShardDataModule):
    """A ShardDataModule whose batches are those of PhotographDataset.

    run  seed, global_batch, micro_batch and bad_samples of a ShardDataModule

    Photographs are shown whole: the settings of crops (scale, val_crop, decode) have no effect.
    Raises DataError also in mode stream, and with several views, RandAugment or 16 bits.
    """

    def __init__(self, config: DataConfig, *, image_size: int, **run: Any):
        if config.mode == "stream" or config.views_per_image > 1 or config.bits != 8 or config.rand_augment:
            raise DataError(
                "whole photographs are read from indexed shards, one view per image, 8 bits, not augmented but "
                f"mirrored; got data.mode={config.mode}, data.views_per_image={config.views_per_image}, "
                f"data.bits={config.bits}, data.rand_augment={config.rand_augment or 'null'}. Leave them out."
            )
        super().__init__(config, image_size=(image_size, image_size), channels=3, **run)

    def dataset(self, index: ShardIndex, seed: int | None = None, replace: bool = True) -> PhotographDataset:
        """Returns the data set that loads batches from an index: mirroring drawn from `seed`, if given."""
        return PhotographDataset(index, self.crop.size[0], self.config.flip, seed, replace)
