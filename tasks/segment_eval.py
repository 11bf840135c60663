"""probe=segment of eval.py: mean IoU by clicks and by box beside the model before its training, with pictures."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.progress import track
from rich.table import Table

from data.datamodule import DataConfig
from data.images.pil import picture
from data.mask_datamodule import MaskDataModule
from data.order.samplers import spread
from mae.errors import ConfigError
from mae.formats.load_segmenter import load_segmenter
from mae.formats.opened import open_weights
from mae.models.config import MAEConfig
from mae.models.execution import BlocksConfig
from mae.models.pixels import Pixels
from mae.run.folder import run_of, write_json
from mae.sam.config import SegmentConfig
from mae.sam.loss import intersection_over_union
from mae.sam.mask_pictures import COLOURS, column, draw_scores, table
from mae.sam.scores import Found, by_box, by_clicks, photograph_of, score
from mae.sam.segmenter import Segmenter
from tasks.segment import initial_segmenter


class SegmentProbe(BaseModel):
    """Objects of the validation photographs, found by simulated clicks and by their boxes.

    clicks    numbers of clicks after which is measured
    pictures  photographs that are painted, one object of each
    images    at most so many photographs, evenly spread; None: all
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["segment"]
    clicks: list[int] = Field(min_length=1)
    pictures: int = Field(6, ge=0)
    images: int | None = Field(None, ge=1)


def evaluate_segmentation(
    probe: SegmentProbe, checkpoint: Path, given: dict[str, Any], seed: int, results: Path
) -> dict[str, dict[str, Any]]:
    """The scores of a run of task=segment and of its start, or of another SAM and a random one; written to `results`.

    given  settings of the data that shall differ from those of the run; None: as there

    Raises ConfigError when there are no validation photographs.
    """
    opened = open_weights(checkpoint)
    trained = load_segmenter(opened)
    run = run_of(checkpoint)
    settings: Any = OmegaConf.to_container(OmegaConf.load(run / "config.yaml")) if run else {"data": {}}
    start = before(trained, settings if run and opened.kind == "segmentation" else None, seed)
    changed = {name: value for name, value in given.items() if value is not None}
    config = DataConfig.model_validate(settings["data"] | changed | {"weights": None})
    side = trained.encoder.config.image_size[0]
    data = MaskDataModule(config, image_size=side, masks_per_image=None, seed=0, global_batch=1, micro_batch=1)
    if data.val_index is None:
        raise ConfigError("probe=segment needs validation photographs: set data.val_path")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {"trained": trained.to(device), "untrained": start.to(device).eval()}
    normalise = Pixels(config.mean, config.std).to(device).normalise
    chosen = spread(len(data.val_index), probe.images or len(data.val_index))
    loader = data.evaluation_loader(data.val_index, 1, samples=chosen)
    scores = score(models, track(loader, "objects", transient=True), normalise, probe.clicks, device)
    results.mkdir(parents=True, exist_ok=True)
    draw_scores(results / "segment.png", scores, str(checkpoint))
    if probe.pictures:
        paint(models, data, probe, normalise, device).save(results / "segment_pictures.png")
    record = {"probe": probe.name, "checkpoint": str(checkpoint), **scores, "settings": probe.model_dump()}
    write_json(results / "segment.json", record | {"seed": seed})
    report(scores, checkpoint, results)
    return scores


def before(trained: Segmenter, settings: dict[str, Any] | None, seed: int) -> Segmenter:
    """What a run started from, made again as the run made it; of other files the same model of random weights."""
    if settings is None:
        torch.manual_seed(seed)
        return Segmenter(type(trained.encoder)(trained.encoder.config))
    torch.manual_seed(settings["seed"])
    model, task = MAEConfig.model_validate(settings["model"]), SegmentConfig.model_validate(settings["task"])
    return initial_segmenter(model, task, BlocksConfig(), settings["init_from"])


@torch.inference_mode()
def paint(
    models: dict[str, Segmenter], data: MaskDataModule, probe: SegmentProbe, normalise: Any, device: torch.device
) -> Any:
    """A row for the largest object but whole backgrounds of each of a few photographs: the truth, and what each model
    finds after one click and in the box."""
    index = data.val_index
    assert index is not None
    titles = ["object"] + [f"{name}, {kind}" for kind in ("1 click", "box") for name in ("untrained", "trained")]
    rows = []
    for batch in data.evaluation_loader(index, 1, samples=spread(len(index), probe.pictures)):
        photograph = photograph_of(batch, normalise, device)
        areas = batch["masks"].float().mean((1, 2))
        truth = batch["masks"][int(torch.where(areas < 0.5, areas, 0).argmax())][None].to(device)
        image = picture(index.read(int(batch["samples"][0])), "RGB")
        height, width = photograph.original
        pixels = np.asarray(image.resize((width, height)))
        row = [(column(pixels, truth[0].cpu().numpy(), COLOURS["truth"]), batch["keys"][0])]
        scale = photograph.original[1] / photograph.inside[1]
        for kind in ("clicks", "box"):
            for name in ("untrained", "trained"):
                model = models[name]
                embedding = model(photograph.images)
                if kind == "box":
                    found = by_box(model, embedding, photograph, truth)
                else:
                    found = by_clicks(model, embedding, photograph, truth, 1)[0]
                row.append(painted(pixels, found, truth, scale))
        rows.append(row)
    return table(titles, rows)


def painted(pixels: np.ndarray, found: Found, truth: torch.Tensor, scale: float) -> tuple[Any, str]:
    """One answer over its photograph with its prompt, and its IoU; scale: pixels of the photograph per pixel of the
    frame."""
    prompts = found.prompts
    box, points = None, []
    if prompts.boxed[0]:
        box = (prompts.boxes[0] * scale).tolist()
    else:
        places = ((prompts.points[0] + 0.5) * scale - 0.5).tolist()
        points = [(x, y, label) for (x, y), label in zip(places, prompts.labels[0].tolist(), strict=True)]
    iou = float(intersection_over_union(found.masks, truth)[0])
    return column(pixels, found.masks[0].cpu().numpy(), COLOURS["mask"], points, box), f"IoU {iou:.2f}"


def report(scores: dict[str, dict[str, Any]], checkpoint: Path, results: Path) -> None:
    """The table on the screen, and where the files are."""
    first = next(iter(scores.values()))
    shown = Table(title=f"{checkpoint}: mean IoU over {first['objects']:,} objects", title_justify="left")
    shown.add_column("model")
    for count in first["clicks"]:
        shown.add_column(f"{count} click{'s' if count > 1 else ''}", justify="right")
    shown.add_column("box", justify="right")
    for name, result in scores.items():
        shown.add_row(name, *(f"{value:.3f}" for value in result["clicks"].values()), f"{result['box']:.3f}")
    Console().print(shown)
    print(results / "segment.json")
