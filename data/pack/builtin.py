"""Built-in data sets: real images from installed packages, packed on first use.

digits         scikit-learn's 1,797 handwritten digits, 8×8 drawn at 32×32, grey, ten classes
placed_digits  each of them twice, in another size and at another place of the 32×32: an encoder without training tells
               them apart far worse than one with it, which it does not where every digit fills its image
photos         photographs of scikit-image and scikit-learn, as overlapping crops of 160×160; each photograph is a
               class; test crops come from its right edge, which no training crop touches
"""

import importlib.util
import io
import shutil
import sys
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from data.atomic import publish
from data.errors import DataError
from data.order.hashing import PACK, hashes, key, permutation
from data.pack.pack import pack
from data.pack.sample import Sample
from data.storage.claim import claim

PHOTOS = {
    "skimage": (
        "astronaut.png brick.png camera.png cell.png chelsea.png clock_motion.png coffee.png coins.png grass.png "
        "gravel.png hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png retina.jpg rocket.jpg"
    ),
    "sklearn": "china.jpg flower.jpg",
}
FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}
SIDE = 32  # pixels of an image of digits
CROP = 160  # pixels of a crop of a photograph
MIN_STEP = 16  # pixels between crops
TEST_SHARE = 0.2  # of the samples of a digit, of the width of a photograph


def ensure(source: str, root: str | Path) -> str:
    """Returns the folder of a built-in data set with its parts train/ and test/, and packs it if it is not there yet.

    Of several processes, on any machines, one packs it and the others wait.
    """
    folder = Path(root) / "built_in" / source
    if folder.exists():
        return str(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with claim(str(folder)):
            if not folder.exists():
                _pack(source, folder)
    except OSError as error:
        raise DataError(f"{folder} cannot be created ({error.strerror}). Set data.root to a folder of yours.") from None
    return str(folder)


def _pack(source: str, folder: Path) -> None:
    print(f"packing the built-in images {source} into {folder}", file=sys.stderr)
    unfinished = folder.with_name(f"{source}.partial-{uuid.uuid4().hex}")
    makers = {"digits": _make_digits, "placed_digits": partial(_make_digits, copies=2), "photos": _cut_photos}
    classes, parts = makers[source]()
    try:
        for part, samples in parts.items():
            pack(samples, unfinished / part, name=f"{source}-{part}", classes=classes, shard_size=500, max_bad=0)
        publish(unfinished, folder)
    except OSError:
        if not folder.exists():  # by another process, which has taken this one for dead
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _make_digits(copies: int = 0) -> tuple[list[str], dict[str, list[Sample]]]:
    """Returns the classes and parts. All copies of a digit are in one part; without copies each fills its image."""
    from sklearn.datasets import load_digits  # This import takes half a second, and only packing needs it.

    values, labels = map(np.asarray, load_digits(return_X_y=True))
    parts: dict[str, list[Sample]] = {"train": [], "test": []}
    for label in range(10):
        numbers = permutation(key(PACK, label), np.flatnonzero(labels == label))
        for rank, number in enumerate(numbers):
            part = "test" if rank < round(len(numbers) * TEST_SHARE) else "train"
            whole = f"{label}/{number:04d}"
            copied = {f"{whole}_{copy}": _place(int(number), copy) for copy in range(copies)}
            for name, place in (copied or {whole: (SIDE, 0, 0)}).items():
                draw = partial(_draw_digit, values[number], *place)
                parts[part].append(Sample(name, "png", label, name, draw))
    return [str(label) for label in range(10)], parts


def _place(number: int, copy: int) -> tuple[int, int, int]:
    """Draws side, left and top of a copy of a digit: half to three quarters of the image, anywhere in it."""
    side, left, top = hashes(key(PACK, number, copy), np.arange(3)).tolist()
    side = SIDE // 2 + side % (SIDE // 4 + 1)
    return side, left % (SIDE - side + 1), top % (SIDE - side + 1)


def _draw_digit(values: np.ndarray, side: int, left: int, top: int) -> bytes:
    """Returns a PNG of 32×32, black but for a square that is enlarged (bicubic) from 8×8 values 0 … 16."""
    small = Image.fromarray(np.round(values.reshape(8, 8) * (255 / 16)).astype(np.uint8))
    whole = Image.new("L", (SIDE, SIDE))
    whole.paste(small.resize((side, side), Image.Resampling.BICUBIC), (left, top))
    return _encode(whole, "PNG", optimize=True)


def _cut_photos() -> tuple[list[str], dict[str, list[Sample]]]:
    files = list(_find_photos())
    parts: dict[str, list[Sample]] = {"train": [], "test": []}
    for label, file in enumerate(files):
        with Image.open(file) as image:
            photo = image.convert("L" if image.mode == "L" else "RGB")
        border = photo.width - max(CROP, round(photo.width * TEST_SHARE))
        for part, (left, right), most in (("train", (0, border), 10), ("test", (border, photo.width), 5)):
            for top in _spread_crops(0, photo.height, most):
                for x in _spread_crops(left, right, most):
                    name = f"{file.stem}/{top:04d}_{x:04d}"
                    crop = photo.crop((x, top, x + CROP, top + CROP))
                    parts[part].append(Sample(name, "jpg", label, name, partial(_encode, crop, "JPEG", quality=95)))
    return [file.stem for file in files], parts


def _find_photos() -> Iterator[Path]:
    for package, names in PHOTOS.items():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise DataError(f"data.source=photos needs the package {package}. Install it, or use data.source=digits.")
        for name in names.split():
            file = Path(spec.submodule_search_locations[0], FOLDERS[package], name)
            if file.exists():  # Some versions of the wheels carry fewer.
                yield file


def _spread_crops(start: int, stop: int, most: int) -> list[int]:
    """Returns where at most `most` crops begin on a side: evenly spread, at least MIN_STEP apart."""
    room = stop - start - CROP
    return [start + round(place) for place in np.linspace(0, room, min(most, room // MIN_STEP + 1))]


def _encode(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()
