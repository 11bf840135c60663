"""Results of eval.py in a run folder: scores with their baselines; settings and what was chosen; pictures."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mae.errors import ConfigError
from mae.report.axes import number
from mae.report.run_files import read_own, read_text
from mae.run.checkpoint_files import flatten

# Probes whose files hold scores.
SCORED = ("knn", "linear", "attentive", "reconstruct", "classify", "segment", "dense")
UNSCORED = ("suite", "neighbours", "relevance", "embeddings", "losses")  # with files that hold none, or others again
WEIGHTS = ("average", "raw")  # folders of results of other weights than the usual ones of a run
# The other numbers of a model were chosen on training images, or say more of these.
SCORES = ("top1", "top5", "loss", "clicks", "box", "miou", "delta1", "abs_rel")
DENSE = {"miou": "mean IoU", "delta1": "depth within a factor of 1.25", "abs_rel": "relative error of depth"}
COUNTS = {"train_images": "training images", "test_images": "test images", "floor_images": "images of the baselines"}


class Result(BaseModel, extra="allow"):
    """The parts of a result that the report reads."""

    trained: dict[str, Any]
    untrained: dict[str, Any] = {}
    floors: dict[str, Any] = {}
    settings: dict[str, Any] = {}


@dataclass(frozen=True)
class Evaluation:
    """One result of eval.py.

    name      of the probe, with the folder of the images if they are not those of the run
    scores    (measured, trained, untrained, baselines)
    settings  (name, value): what was chosen for each encoder, numbers of images, settings
    pictures  files
    """

    name: str
    scores: list[tuple[str, str, str, str]]
    settings: list[tuple[str, str]]
    pictures: list[Path]


def read_evaluations(folder: Path) -> tuple[list[Evaluation], list[str]]:
    """Returns the results in eval/, and the names of files that are not ours. Raises ConfigError if one is damaged."""
    found, left_out = [], []
    places = [folder, *(folder / weights for weights in WEIGHTS)]
    files = [file for place in places for each in ("*.json", "on-*/*.json") for file in place.glob(each)]
    for file in sorted(files, key=lambda file: (file.stem, len(file.parts), file)):
        name = _name(file.relative_to(folder))
        pictures = _pictures(file)
        if file.stem in SCORED and file.is_file():
            found.append(_evaluation(name, read_own(file, Result), pictures))
        elif file.stem in UNSCORED:
            if file.stem == "relevance" and pictures:
                found.append(Evaluation(name, [], [], pictures))
        elif (contents := _result_of_others(file)) is not None:
            found.append(_evaluation(name, contents, pictures))
        else:
            left_out.append(str(file.relative_to(folder.parent)))
    return [evaluation for evaluation in found if evaluation.scores or evaluation.pictures], left_out


def _name(file: Path) -> str:
    """Returns the name of a result: "knn", "knn on FOLDER", "knn of the average weights"."""
    words = [file.stem]
    for part in file.parent.parts:
        words.append(f"of the {part} weights" if part in WEIGHTS else f"on {part.removeprefix('on-')}")
    return " ".join(words)


def _result_of_others(file: Path) -> dict[str, Any] | None:
    """Returns the contents of a file that somebody else wrote like a result of ours, None if it is none."""
    try:
        contents = json.loads(read_text(file))
    except (ConfigError, ValueError, RecursionError):
        return None
    return contents if isinstance(contents, dict) and isinstance(contents.get("trained"), dict) else None


def _pictures(file: Path) -> list[Path]:
    """Returns what a probe has drawn, from its name: knn.png, reconstruct/ratio-0.75.png, segment_pictures.png."""
    beside = [file.with_suffix(".png"), file.with_name(f"{file.stem}_pictures.png")]
    return [path for path in (*beside, *sorted(file.with_suffix("").glob("*.png"))) if path.is_file()]


def _evaluation(name: str, contents: dict[str, Any], pictures: list[Path]) -> Evaluation:
    trained, untrained, floors = (_numbers(contents.get(part)) for part in ("trained", "untrained", "floors"))
    ours = name.split()[0] in SCORED
    scores, settings = [], []
    for measured, value in trained.items():
        both = _shown(measured, value), _shown(measured, untrained.get(measured))
        if not ours or measured.split(".")[0] in SCORES:
            scores.append((f"{name}, {_title(measured)}", *both, _baselines(measured, floors)))
        else:
            settings.append((measured, f"{both[0]} trained, {both[1] or 'none'} untrained"))
    settings += [(title, f"{contents[key]:,}") for key, title in COUNTS.items() if isinstance(contents.get(key), int)]
    own = contents.get("settings")
    settings += [(key, str(value)) for key, value in flatten(own if isinstance(own, dict) else {}) if key != "name"]
    return Evaluation(name, scores, settings, pictures)


def _numbers(tree: Any) -> dict[str, float]:
    """Returns the numbers in nested objects by their dotted names."""
    leaves = flatten(tree) if isinstance(tree, dict) else ()
    return {name: value for name, value in leaves if isinstance(value, int | float) and not isinstance(value, bool)}


def _title(measured: str) -> str:
    """Returns a score's name in words: "top1", "loss.0.75", "clicks.3", "box", "miou.knn"."""
    kind, _, rest = measured.partition(".")
    match kind:
        case "top1" | "top5":
            return f"top-{kind[3:]}"
        case "loss" if rest:
            return f"loss, {float(rest):.0%} hidden" if rest.replace(".", "", 1).isdigit() else f"loss, {rest}"
        case "clicks":
            return f"mean IoU, {rest} click{'s' if rest != '1' else ''}"
        case "box":
            return "mean IoU, box"
        case "miou" | "delta1" | "abs_rel":
            return f"{DENSE[kind]}, {rest}"
    return measured


def _shown(measured: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" if measured.split(".")[0] in ("top1", "top5", "miou", "delta1") else number(value)


def _baselines(measured: str, floors: dict[str, float]) -> str:
    """Returns the baselines of a score: those of its mask ratio, or of its classes."""
    kind, _, ratio = measured.partition(".")
    if kind == "top1" and "largest class" in floors:
        return f"largest class {floors['largest class']:.1%}"
    if kind in DENSE:
        of_head = {name.removeprefix(f"{measured}."): value for name, value in floors.items() if measured in name}
        return ", ".join(f"{name} {_shown(measured, value)}" for name, value in of_head.items())
    of_ratio = {name.removeprefix(f"{ratio}."): value for name, value in floors.items() if name.startswith(f"{ratio}.")}
    return ", ".join(f"{name} {number(value)}" for name, value in of_ratio.items()) if kind == "loss" and ratio else ""
