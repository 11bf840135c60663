"""A SAM on validation photographs: what probe=segment and probe=relevance open, and how they draw its answers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from data.evaluation import explain_unreadable, left_out_sentence
from data.images.masks import CodedMasks
from data.images.pil import picture
from data.loader.dataset import Batch
from data.mask_datamodule import MaskDataModule
from data.order.samplers import spread
from mae.errors import ConfigError
from mae.formats.load_segmenter import load_segmenter
from mae.formats.opened import open_weights
from mae.models.pixels import Pixels
from mae.run.checkpoint_files import Weights
from mae.run.folder import stored_settings
from mae.run.of_weights import run_of
from mae.sam.pictures import MASK_COLOURS, draw_answer
from mae.sam.scores import Found, Photograph, photograph_of
from mae.sam.segmenter import Prompts
from tasks.evaluation_folder import read_data_settings


class Example(NamedTuple):
    """A photograph and its largest object, whole backgrounds left out.

    sample  number in the data set
    truth   bool [1, height, width]
    pixels  uint8 [height, width, 3]
    """

    sample: int
    key: str
    photograph: Photograph
    truth: Tensor
    pixels: np.ndarray


class SamOnPhotographs:
    """A SAM and the validation photographs of its run, or those that `given` names; on the GPU if there is one.

    weights       raw or average, of a checkpoint that holds both
    given         data settings in place of the run's; None: unchanged
    run_settings  config.yaml of the run of task=segment that the checkpoint belongs to; None for another SAM
    unreadable    keys of the photographs that could not be read so far

    Raises ConfigError if there are no validation photographs.
    """

    def __init__(self, probe: str, checkpoint: Path, weights: Weights | None, given: dict[str, Any]) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        opened, run = open_weights(checkpoint, weights=weights), run_of(checkpoint)
        self.model = load_segmenter(opened).to(self.device)
        self.run_settings: Any = None
        if run and opened.kind == "segmentation":
            self.run_settings = stored_settings(run)
        self.opened = opened
        config = read_data_settings(checkpoint, opened, 3, given)
        side = self.model.encoder.config.image_size[0]
        self.data = MaskDataModule(config, image_size=side, masks_per_image=None, seed=0, global_batch=1, micro_batch=1)
        if self.data.val_index is None:
            raise ConfigError(f"probe={probe} needs validation photographs: set data.val_path")
        self.index, self.unreadable = self.data.val_index, set[str]()
        self.normalise = Pixels(config.mean, config.std).to(self.device).normalise

    def batches(self, at_most: int | None) -> Iterator[Batch]:
        """Yields batches of one photograph with all its masks, coded; `at_most` so many photographs, evenly spread.

        Says which cannot be read, and leaves them out.
        """
        chosen = spread(len(self.index), at_most or len(self.index))
        lost = []
        loader = self.data.evaluation_loader(self.index, 1, samples=chosen, replace=False)
        for sample, batch in zip(chosen.tolist(), loader, strict=True):
            if len(batch["positions"]):
                yield batch
            else:
                lost.append(sample)
        if lost:
            keys = [self.index.key(sample) for sample in lost]
            if not {*keys} <= self.unreadable:
                reason = explain_unreadable(self.data, self.index, lost[0])
                print(left_out_sentence("test", keys, len(chosen), reason))
            self.unreadable |= {*keys}

    def examples(self, count: int) -> Iterator[Example]:
        """Yields at most `count` photographs, evenly spread, that have an object."""
        for batch in self.batches(count):
            masks: CodedMasks = batch["masks"]
            if len(masks) == 0:
                continue
            photograph = photograph_of(batch, self.normalise, self.device)
            most = masks.size[0] * masks.size[1] / 2
            largest = int(np.where(masks.areas < most, masks.areas, 0).argmax())
            truth = torch.from_numpy(masks.stack(largest, largest + 1)).to(self.device)
            sample = int(batch["samples"][0])
            image = picture(self.index.read(sample), "RGB")
            height, width = photograph.original
            pixels = np.asarray(image.resize((width, height)))
            yield Example(sample, batch["keys"][0], photograph, truth, pixels)


def draw_found(example: Example, found: Found) -> Image:
    points, box = prompt_in_photograph(found.prompts, example.photograph)
    return draw_answer(example.pixels, found.masks[0].cpu().numpy(), MASK_COLOURS["mask"], points, box)


def prompt_in_photograph(
    prompts: Prompts, photograph: Photograph, row: int = 0
) -> tuple[list[tuple[float, float, int]], Any]:
    """Returns the points (x, y, label) and the box of one prompt in pixels of the photograph; no points with a box, and
    None without."""
    scale = photograph.original[1] / photograph.inside[1]
    if prompts.boxed[row]:
        return [], (prompts.boxes[row] * scale).tolist()
    places = ((prompts.points[row] + 0.5) * scale - 0.5).tolist()
    return [(x, y, label) for (x, y), label in zip(places, prompts.labels[row].tolist(), strict=True)], None
