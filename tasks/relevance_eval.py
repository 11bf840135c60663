"""probe=relevance of eval.py: what a SAM's encoder attends to, and what prompts change in its embedding.

For each photograph:
1 answer   the click and the box of its largest object, or the points of the user     mae/sam/scores.py
2 look     attention of every block, mean over heads and rollout                      mae/sam/relevance.py
3 gate     relevance of each token to each prompt, and the change of the embedding
4 draw     relevance/SAMPLE/block-*.png, a row per prompt in relevance.png, numbers in relevance.json
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import BaseModel, Field, field_validator
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from mae.errors import ConfigError
from mae.run.checkpoint_files import Weights
from mae.run.folder import write_json
from mae.sam.pictures import COLUMN_WIDTH, draw_table, overlay, save_overlays
from mae.sam.relevance import RelevanceAwareEncoder
from mae.sam.scores import Found, by_box, by_clicks, by_prompts
from mae.sam.segmenter import FOREGROUND, Prompts, Segmenter
from mae.sam.square_frame import maps_to_photograph, points_to_frame
from tasks.evaluation_folder import choose_folder, record_data
from tasks.sam_on_photographs import Example, SamOnPhotographs, draw_found, prompt_in_photograph

TITLES = ["answer", "gate, from 0 to 1", "change of the embedding", "rollout through all blocks"]


class RelevanceProbe(BaseModel, frozen=True, extra="forbid"):
    """Maps of attention and relevance over validation photographs.

    images  number of photographs, evenly spread
    points  one prompt for all photographs: [x, y] or [x, y, label] in shares of width and height, label 1 (object,
            the default) or 0 (background). None: a click and the box of the largest object of each photograph
    """

    name: Literal["relevance"]
    images: int = Field(3, ge=1)
    points: list[list[float]] | None = Field(None, min_length=1)

    @field_validator("points")
    @classmethod
    def _inside(cls, points: list[list[float]] | None) -> list[list[float]] | None:
        for point in points or ():
            inside = all(0 <= share <= 1 for share in point)
            if len(point) not in (2, 3) or not inside or point[2:] not in ([], [0], [1]):
                raise ValueError(
                    f"{point} is no point of a photograph: give [x, y] or [x, y, label], with x and y from 0 to 1 as "
                    "shares of its width and height, and label 1 (object) or 0 (background)"
                )
        return points


@torch.inference_mode()
def evaluate_relevance(
    probe: RelevanceProbe,
    checkpoint: Path,
    given: dict[str, Any],
    out: Path | None,
    wandb: bool = False,
    check: Callable[[], None] = lambda: None,
    weights: Weights | None = None,
) -> None:
    """Draws and measures relevance on validation photographs.

    given    data settings in place of the run's; None: unchanged
    out      folder of the results; None: see `choose_folder`
    wandb    whether they shall go to the run's W&B run, which takes those on its own images
    check    called before anything is written, see `same_run`
    weights  raw or average, of a checkpoint that holds both

    Raises ConfigError if there are no validation photographs, or no objects in them.
    """
    sam = SamOnPhotographs(probe.name, checkpoint, weights, given)
    results = choose_folder(checkpoint, sam.opened, sam.data, out=out, wandb=wandb)
    encoder = RelevanceAwareEncoder(sam.model.encoder).to(sam.device).eval()
    if sam.model.relevance is not None:
        encoder.load_state_dict(encoder.state_dict() | sam.model.relevance.state_dict())
    rows, photographs = [], []
    for example in sam.examples(probe.images):
        check()
        folder = results / "relevance" / f"{example.sample:06d}"
        drawn, prompts = examine(sam.model, encoder, example, probe.points, folder)
        rows += drawn
        photographs.append({"sample": example.sample, "key": example.key, "folder": str(folder), "prompts": prompts})
    if not rows:
        raise ConfigError(
            f"probe=relevance found no object in {probe.images} validation photographs: raise probe.images, or set "
            "data.val_path to photographs with masks"
        )
    check()
    draw_table(TITLES, rows).save(results / "relevance.png")
    record = {
        "probe": probe.name,
        "checkpoint": str(checkpoint),
        "weights": sam.opened.taken,
        "identity": encoder.is_identity,
    }
    record |= {"photographs": photographs, "pictures": [str(results / "relevance.png")]}
    record["unreadable"] = {"test": sorted(sam.unreadable)}
    write_json(results / "relevance.json", record | {"settings": probe.model_dump(), "data": record_data(sam.data)})
    if encoder.is_identity:
        print(
            f"{checkpoint} has no trained gate (train with task.relevance=true): it is one half everywhere, and "
            "prompts leave the embedding as it is"
        )
    print(f"{results / 'relevance.json'}, {results / 'relevance.png'}, {results / 'relevance'}/")


def examine(
    model: Segmenter, encoder: RelevanceAwareEncoder, example: Example, points: list[list[float]] | None, folder: Path
) -> tuple[list[list[tuple[Image.Image, str]]], dict[str, Any]]:
    """Writes the maps of the blocks to `folder`; returns a row of pictures and the numbers of each prompt."""
    photograph = example.photograph
    height, width = photograph.original
    size = round(height * COLUMN_WIDTH / width), COLUMN_WIDTH
    image = to_tensor(Image.fromarray(example.pixels).resize((size[1], size[0])))

    def shown(maps: Tensor) -> Tensor:
        """Resizes maps [1, K, h, w] of the frame to the picture of the photograph, [K, height, width]."""
        return maps_to_photograph(maps, photograph.side, photograph.inside, size)[0]

    maps = encoder.block_maps(photograph.images)
    blocks = {"mean": shown(maps.mean), "rollout": shown(maps.rollout)}
    save_overlays(folder, image, blocks)
    embedding = model(photograph.images)
    h, w = (-(-length // encoder.encoder.config.patch_size) for length in photograph.inside)
    rows, numbers = [], {}
    for name, found in answer_prompts(model, embedding, example, points).items():
        features, gate, _ = encoder.participate(encoder.propose(embedding), model.embed(found.prompts)[0])
        change = (features - embedding).norm(dim=1) / embedding.norm(dim=1)
        of_gate, of_change = (statistics(values[:, :h, :w]) for values in (gate, change))
        places, box = prompt_in_photograph(found.prompts, photograph)
        numbers[name] = {"points": places, "box": box, "gate": of_gate, "change": of_change}
        most = of_change["max"]
        pictures = [
            (draw_found(example, found), f"{example.key}, {name}"),
            (overlay(image, shown(gate[None])[0], (0, 1)), f"{of_gate['min']:.2f} to {of_gate['max']:.2f}"),
            (overlay(image, shown(change[None])[0], (0, most)), f"{of_change['min']:.1%} to {most:.1%}"),
            (overlay(image, blocks["rollout"][-1]), f"block {len(blocks['rollout']) - 1}"),
        ]
        rows.append(pictures)
    return rows, numbers


def answer_prompts(
    model: Segmenter, embedding: Tensor, example: Example, points: list[list[float]] | None
) -> dict[str, Found]:
    """Segments the largest object by a click and by its box, or whatever lies at the given points."""
    photograph, truth = example.photograph, example.truth
    if points is None:
        (clicked,) = by_clicks(model, embedding, photograph, truth, 1)
        return {"click": clicked, "box": by_box(model, embedding, photograph, truth)}
    height, width = photograph.original
    places = embedding.new_tensor([point[:2] for point in points]) * embedding.new_tensor([width, height]) - 0.5
    labels = torch.tensor([[int(point[2]) if point[2:] else FOREGROUND for point in points]], device=truth.device)
    there = points_to_frame(places, photograph.original, photograph.inside)[None]
    prompts = Prompts(there, labels, there.new_zeros(1, 4), torch.zeros_like(labels[:, 0], dtype=torch.bool))
    return {"points": by_prompts(model, embedding, photograph, prompts)}


def statistics(values: Tensor) -> dict[str, float]:
    return {"min": float(values.min()), "mean": float(values.mean()), "max": float(values.max())}
