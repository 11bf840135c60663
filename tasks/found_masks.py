"""Masks that a SAM finds, as files that other tools read: COCO instances and results, and SA-1B records.

1 collect  each answer as a run-length code with its scores and its prompt
2 name     photographs as their records do, or by number where that does not tell them apart
3 write    FOLDER/truth.json, FOLDER/PROMPT.json, FOLDER/PROMPT/KEY.json
"""

import json
import shutil
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from data.images.masks import encode
from data.loader.mask_dataset import MaskDataset
from mae.errors import ConfigError
from mae.sam.scores import Answered, Found, stability
from tasks.sam_on_photographs import prompt_in_photograph

Entry = dict[str, Any]
Entries = list[tuple[int, Entry]]  # each with the sample that it is of
CATEGORY = {"id": 1, "name": "object"}  # records of SA-1B know no classes
TRUTH = "truth.json"
MADE_BY = "probe=segment"  # the mark of a folder that may be replaced


class FoundMasks:
    """Masks that the trained model finds in photographs of a data set, and the true ones beside them.

    folder   that `write` makes
    dataset  whose batches are scored

    Raises ConfigError if the folder holds anything else.
    """

    def __init__(self, folder: Path, dataset: MaskDataset) -> None:
        if folder.exists() and not _is_ours(folder):
            raise ConfigError(f"{folder} holds something else than masks of {MADE_BY}: move it, or set out=")
        self.folder, self.dataset = folder, dataset
        self.photographs: dict[int, Entry] = {}  # by sample: key, image_id, file_name, width, height
        self.truth: Entries = []
        self.found: defaultdict[str, Entries] = defaultdict(list)  # by prompt

    def keep(self, answered: Answered) -> None:
        """Collects what the trained model finds, object by object. The masks of other models are passed over."""
        if answered.model != "trained":
            return
        sample = int(answered.batch["samples"][0])
        record = json.loads(self.dataset.record(sample))
        if sample not in self.photographs:
            self.photographs[sample] = _describe(record, answered.batch["keys"][0], answered.photograph.original)
        self.truth += [(sample, _shape(mask)) for mask in answered.truth.cpu().numpy()]
        numbers = answered.batch["numbers"][answered.objects].tolist()
        identities = [record["annotations"][number].get("id", number) for number in numbers]
        for prompt, found in answered.found.items():
            name = prompt if isinstance(prompt, str) else f"{prompt}_click{'s' if prompt > 1 else ''}"
            annotations = zip(identities, _annotations(found, answered), strict=True)
            self.found[name] += [(sample, {"id": identity, **entry}) for identity, entry in annotations]

    def write(self) -> str:
        """Writes the folder anew, whole or not at all. Returns a remark on the names of photographs, "" if none."""
        remark = self._name_photographs()
        fresh = self.folder.with_name(f"{self.folder.name}.tmp")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        self._write_truth(fresh / TRUTH)
        for prompt, annotations in self.found.items():
            self._write_results(fresh / f"{prompt}.json", annotations)
            self._write_records(fresh / prompt, annotations)
        if self.folder.exists():
            shutil.rmtree(self.folder)
        fresh.rename(self.folder)
        return remark

    def _name_photographs(self) -> str:
        """Replaces ids and keys that cannot name photographs by the numbers of the samples. Says which."""
        said = []
        for name, of in (("image_id", "image_id of the records"), ("key", "keys of the photographs")):
            values = [photograph[name] for photograph in self.photographs.values()]
            if None in values or len(set(values)) < len(values) or not all(map(_stays_inside, map(str, values))):
                said.append(of)
                for sample, photograph in self.photographs.items():
                    photograph[name] = sample if name == "image_id" else f"{sample:06d}"
        return f"{' and '.join(said)} cannot name them: the numbers of the samples stand in their place" if said else ""

    def _write_truth(self, file: Path) -> None:
        """Writes the objects as COCO instances, numbered from 1: pycocotools takes 0 for no match."""
        images = [
            {"id": photograph["image_id"], **{name: photograph[name] for name in ("file_name", "width", "height")}}
            for photograph in self.photographs.values()
        ]
        about = {"category_id": CATEGORY["id"], "iscrowd": 0}
        objects = [
            {"id": number, "image_id": self.photographs[sample]["image_id"], **about, **entry}
            for number, (sample, entry) in enumerate(self.truth, start=1)
        ]
        contents = {"images": images, "annotations": objects, "categories": [CATEGORY]}
        file.write_text(json.dumps({"info": {"description": MADE_BY}, **contents}))

    def _write_results(self, file: Path, annotations: Entries) -> None:
        """Writes COCO results, without boxes: pycocotools would take them for results of boxes, and their areas."""
        results = [
            {
                "image_id": self.photographs[sample]["image_id"],
                "category_id": CATEGORY["id"],
                "segmentation": entry["segmentation"],
                "score": entry["predicted_iou"],
            }
            for sample, entry in annotations
        ]
        file.write_text(json.dumps(results))

    def _write_records(self, folder: Path, annotations: Entries) -> None:
        """Writes a record of SA-1B for each photograph."""
        of_sample: defaultdict[int, list[Entry]] = defaultdict(list)
        for sample, entry in annotations:
            of_sample[sample].append(entry)
        for sample, entries in of_sample.items():
            photograph = self.photographs[sample]
            image = {name: photograph[name] for name in ("image_id", "width", "height", "file_name")}
            file = folder / f"{photograph['key']}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"image": image, "annotations": entries}))


def _is_ours(folder: Path) -> bool:
    try:
        return json.loads((folder / TRUTH).read_text())["info"]["description"] == MADE_BY
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _stays_inside(key: str) -> bool:
    """Returns whether a name leads to a file below the folder that it is put into."""
    path = PurePosixPath(key)
    return not path.is_absolute() and ".." not in path.parts


def _describe(record: Entry, key: str, size: tuple[int, int]) -> Entry:
    """Returns what names a photograph: its key, and what its record says of it (COCO says id, SA-1B image_id)."""
    about = record.get("image")
    about = about if isinstance(about, dict) else {}
    identity = about.get("image_id", about.get("id"))
    names = {
        "key": key,
        "image_id": identity if type(identity) is int else None,
        "file_name": about.get("file_name", key),
    }
    return {**names, "width": size[1], "height": size[0]}


def _shape(mask: np.ndarray) -> Entry:
    """Returns run-length code, area in pixels and box (x, y, width, height) of a mask bool [height, width]."""
    from pycocotools import mask as pycocotools

    tools: Any = pycocotools
    code = encode(mask)
    return {"segmentation": code, "area": int(tools.area(code)), "bbox": tools.toBbox(code).tolist()}


def _annotations(found: Found, answered: Answered) -> list[Entry]:
    """Returns annotations of SA-1B. The prompt is in point_coords with point_labels, or in input_box."""
    photograph = answered.photograph
    height, width = photograph.original
    scores = torch.stack([found.ious.float(), stability(found, photograph)], 1).tolist()
    entries = []
    for row, (mask, (iou, stable)) in enumerate(zip(found.masks.cpu().numpy(), scores, strict=True)):
        points, box = prompt_in_photograph(found.prompts, photograph, row)
        prompt: Entry = {"point_coords": [[x, y] for x, y, _ in points]}
        prompt |= {"point_labels": [label for *_, label in points]} if box is None else {"input_box": box}
        quality = {"predicted_iou": iou, "stability_score": stable}
        entries.append({**_shape(mask), **quality, **prompt, "crop_box": [0.0, 0.0, float(width), float(height)]})
    return entries
