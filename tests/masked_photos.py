"""Small shards of photographs with masks, in SA-1B's format."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from data.images.masks import encode

ORIENTATION = 0x0112


def jpeg(pixels: np.ndarray, orientation: int = 1) -> bytes:
    """A JPEG that is shown as `pixels` [H, W, 3], stored as this EXIF orientation wants it."""
    undone = {1: (), 2: (0,), 3: (3,), 4: (1,), 5: (5,), 6: (2,), 7: (6,), 8: (4,)}[orientation]  # PIL's transpositions
    image = Image.fromarray(pixels)
    for method in undone:
        image = image.transpose(Image.Transpose(method))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0, exif=exif)
    return buffer.getvalue()


def record(masks: list[np.ndarray]) -> bytes:
    height, width = masks[0].shape
    return json.dumps(
        {
            "image": {"width": width, "height": height},
            "annotations": [{"id": number, "segmentation": encode(mask)} for number, mask in enumerate(masks)],
        }
    ).encode()


def write_tar(path: Path, samples: list[tuple[bytes, bytes | None]]) -> Path:
    """A tar of 000000.jpg, 000000.json, …; without a record where there is None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, parts in enumerate(samples):
            for extension, data in zip(("jpg", "json"), parts, strict=True):
                if data is not None:
                    member = tarfile.TarInfo(f"{number:06d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return path


def shapes(number: int, height: int = 90, width: int = 120) -> tuple[np.ndarray, list[np.ndarray]]:
    """A picture of a disc and a bar on a background, and their masks."""
    rng = np.random.default_rng(number)
    rows, columns = np.mgrid[:height, :width]
    centre = rng.uniform(0.3, 0.7, 2) * (height, width)
    disc = np.hypot(rows - centre[0], columns - centre[1]) < height * rng.uniform(0.15, 0.3)
    bar = (np.abs(columns - rng.uniform(0.1, 0.9) * width) < width * 0.06) & ~disc
    pixels = np.full((height, width, 3), rng.integers(60, 120, 3), np.uint8)
    pixels[disc], pixels[bar] = rng.integers(150, 255, 3), rng.integers(0, 60, 3)
    return pixels, [disc, bar]


def shards_of_shapes(folder: Path, train: int = 24, val: int = 8) -> Path:
    """FOLDER with a train and a val shard of such pictures."""
    for split, numbers in (("train", range(train)), ("val", range(1000, 1000 + val))):
        samples = [(jpeg(pixels), record(masks)) for pixels, masks in map(shapes, numbers)]
        write_tar(folder / f"shapes-{split}-000000.tar", samples)  # pyright: ignore[reportArgumentType]
    return folder


def write_coco(folder: Path, file: Path, count: int = 4) -> tuple[Path, Path]:
    """Such pictures and a COCO file of their objects: polygons, run lengths, a crowd, a last image without objects."""
    images, objects = [], []
    folder.mkdir(parents=True)
    for number in range(count):
        pixels, masks = shapes(number)
        name = f"{number}.jpg"
        (folder / name).write_bytes(jpeg(pixels))
        images.append({"id": 10 + number, "file_name": name, "height": 90, "width": 120})
        if number < count - 1:
            objects += [{"id": len(objects), "image_id": 10 + number, "segmentation": encode(mask)} for mask in masks]
    square = [[10, 20, 50, 20, 50, 60, 10, 60]]
    objects.append({"id": 90, "image_id": 10, "segmentation": square, "iscrowd": 0})
    crowd = {"size": [90, 120], "counts": [100, 50, 10650]}
    objects.append({"id": 91, "image_id": 10, "segmentation": crowd, "iscrowd": 1})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"images": images, "annotations": objects}))
    return folder, file
