"""probe=segment of eval.py: mean IoU by clicks and by box beside the model before its training, with pictures.

1 open    the SAM, and the validation photographs of its run
2 before  the model that the run started from
3 score   every object by clicks and by box                                    mae/sam/scores.py
4 write   segment.json, a table; segment_masks/, if wanted                      found_masks.py
5 draw    segment.png, segment_pictures.png
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from PIL.Image import Image
from pydantic import BaseModel, Field, PositiveInt
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mae.errors import CheckpointError, ConfigError
from mae.models.config import MAEConfig
from mae.models.execution import BlocksConfig
from mae.run.checkpoint_files import Weights
from mae.run.folder import write_json
from mae.sam.config import SegmentConfig
from mae.sam.loss import intersection_over_union
from mae.sam.pictures import MASK_COLOURS, draw_answer, draw_scores, draw_table
from mae.sam.scores import by_box, by_clicks, score
from mae.sam.segmenter import Segmenter
from tasks.evaluation_folder import choose_folder, record_data
from tasks.found_masks import FoundMasks
from tasks.sam_on_photographs import Example, SamOnPhotographs, draw_found
from tasks.segment import initial_segmenter

SHOWN = "untrained", "trained"  # from left to right in the pictures


class SegmentProbe(BaseModel, frozen=True, extra="forbid"):
    """Scores of objects in validation photographs, found by simulated clicks and by their boxes.

    clicks    numbers of clicks after which the IoU is measured
    pictures  photographs in the picture, one object of each
    masks     write the masks that are found as COCO and SA-1B JSON
    images    at most so many photographs, evenly spread; None: all
    mask_input, multimask
              as in `by_clicks`; None: as the run was trained, which is true for another SAM
    """

    name: Literal["segment"]
    clicks: list[PositiveInt] = Field(min_length=1)
    pictures: int = Field(6, ge=0)
    masks: bool = False
    images: int | None = Field(None, ge=1)
    mask_input: bool | None = None
    multimask: bool | None = None


def evaluate_segmentation(
    probe: SegmentProbe,
    checkpoint: Path,
    given: dict[str, Any],
    seed: int,
    out: Path | None,
    wandb: bool = False,
    check: Callable[[], None] = lambda: None,
    weights: Weights | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores a run of task=segment beside its start, or another SAM beside a random one; writes pictures and JSON.

    given    data settings in place of the run's; None: unchanged
    out      folder of the results; None: see `choose_folder`
    wandb    whether they shall go to the run's W&B run, which takes those on its own images
    check    called before anything is written, see `same_run`
    weights  raw or average, of a checkpoint that holds both

    Raises ConfigError if there are no validation photographs, or no objects in them.
    """
    sam = SamOnPhotographs(probe.name, checkpoint, weights, given)
    results = choose_folder(checkpoint, sam.opened, sam.data, out=out, wandb=wandb)
    masks = FoundMasks(results / "segment_masks", sam.data.dataset(sam.index)) if probe.masks else None
    models, left_out = {"trained": sam.model}, {}
    try:
        models["untrained"] = before(sam.model, sam.run_settings, seed).to(sam.device).eval()
    except (CheckpointError, ConfigError) as error:
        left_out["untrained"] = f"what the run started from cannot be used ({error})"
        print(f"scores of the trained model alone: {left_out['untrained']}")
    asking = choose_answers(probe, sam.run_settings)
    batches = track(sam.batches(probe.images), "objects", transient=True)
    keep = masks.keep if masks else None
    scores = score(models, batches, sam.normalise, probe.clicks, sam.device, **asking, keep=keep)
    if not scores:
        raise ConfigError(
            f"probe=segment found no object in {probe.images or len(sam.index)} validation photographs: set "
            "data.val_path to photographs with masks, or raise probe.images"
        )
    check()
    results.mkdir(parents=True, exist_ok=True)
    record = {"probe": probe.name, "checkpoint": str(checkpoint), "weights": sam.opened.taken, **scores}
    record |= {"settings": probe.model_dump() | asking, "seed": seed, "data": record_data(sam.data)}
    record |= {"left_out": left_out} if left_out else {}
    record["unreadable"] = {"test": sorted(sam.unreadable)}
    if masks:
        if remark := masks.write():
            print(remark)
        record["masks"] = str(masks.folder)
    write_json(results / "segment.json", record)
    report(scores, checkpoint, results)
    draw_scores(results / "segment.png", scores, str(checkpoint))
    if probe.pictures and (rows := draw_examples(models, sam.examples(probe.pictures), asking["multimask"])):
        draw_table(example_titles(models), rows).save(results / "segment_pictures.png")
    return scores


def before(trained: Segmenter, settings: dict[str, Any] | None, seed: int) -> Segmenter:
    """Builds the model that a run started from, as the run did; without a run's settings one of random weights."""
    if settings is None:
        torch.manual_seed(seed)
        return Segmenter(type(trained.encoder)(trained.encoder.config))
    torch.manual_seed(settings["seed"])
    model, task = MAEConfig.model_validate(settings["model"]), SegmentConfig.model_validate(settings["task"])
    return initial_segmenter(model, task, BlocksConfig(), settings["init_from"], weights=settings.get("init_weights"))


def choose_answers(probe: SegmentProbe, settings: dict[str, Any] | None) -> dict[str, bool]:
    """Returns `mask_input` and `multimask`: those of the probe, else those that the run was trained with."""
    trained = {} if settings is None else settings["task"]
    names = "mask_input", "multimask"
    given = {name: getattr(probe, name) for name in names}
    return {name: trained.get(name, True) if given[name] is None else given[name] for name in names}


def example_titles(models: dict[str, Segmenter]) -> list[str]:
    """Returns the titles of the columns that `draw_examples` draws."""
    return ["object", *(f"{name}, {how}" for how in ("1 click", "box") for name in SHOWN if name in models)]


@torch.inference_mode()
def draw_examples(
    models: dict[str, Segmenter], examples: Iterator[Example], multimask: bool
) -> list[list[tuple[Image, str]]]:
    """Draws a row for each example: the object, and what each model finds after one click and in the box."""
    rows = []
    for example in examples:
        photograph, truth = example.photograph, example.truth
        row = [(draw_answer(example.pixels, truth[0].cpu().numpy(), MASK_COLOURS["truth"]), example.key)]
        embeddings = {name: models[name](photograph.images) for name in SHOWN if name in models}
        for kind in ("1 click", "box"):
            for name, embedding in embeddings.items():
                asked = models[name], embedding, photograph, truth
                if kind == "box":
                    found = by_box(*asked, multimask=multimask)
                else:
                    found = by_clicks(*asked, 1, multimask=multimask)[0]
                iou = float(intersection_over_union(found.masks, truth)[0])
                row.append((draw_found(example, found), f"IoU {iou:.2f}"))
        rows.append(row)
    return rows


def report(scores: dict[str, dict[str, Any]], checkpoint: Path, results: Path) -> None:
    """Prints the table, and where the files are."""
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
