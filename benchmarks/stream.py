"""Images per second of ShardLoader beside other loaders, interleaved: python -m benchmarks.stream [--rounds 5]

Images are cut from real photographs (--photos, default MAE_DATASETS/large_photos) at 500×375 and 2250×1500, and written
as a folder of JPEGs and as shards. All loaders yield batches of 224×224 random-resized and flipped crops:

folder    torchvision's ImageFolder, PIL, RandomResizedCrop, ToTensor, Normalize: the pipeline of facebookresearch/mae
wds       webdataset, simplejpeg, crops of uint8 resized by torch's antialiased bicubic: the fastest of webdataset
ours      ShardLoader, decoding exact and fast
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import simplejpeg
import torch
import webdataset as wds
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from torchvision.transforms import v2

from data.config import DataConfig
from data.datamodule import ShardDataModule
from data.loader.dataset import ShardDataset
from data.pack.image_folder import find_images
from data.pack.pack import pack

SIZES = {"500x375": (500, 375), "2250x1500": (2250, 1500)}
COPIES = {"500x375": 1200, "2250x1500": 320}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DATASETS = Path(os.environ.get("MAE_DATASETS", Path(__file__).resolve().parents[2] / "shared" / "datasets"))
WORKERS, BATCH = 2, 64


def make_images(photos: Path, out: Path, size: tuple[int, int], copies: int) -> None:
    """Writes a folder with one class of `copies` JPEGs of quality 95, cut from the photographs."""
    (out / "images" / "0").mkdir(parents=True)
    noise = np.random.default_rng(0)
    originals = []
    for path in sorted(photos.glob("*.jpg")):
        with Image.open(path) as image:
            originals.append(ImageOps.exif_transpose(image).convert("RGB"))
    for number in range(copies):
        original = originals[number % len(originals)]
        keep = noise.uniform(0.7, 1.0)
        width = int(min(original.width, original.height * size[0] / size[1]) * keep)
        height = int(width * size[1] / size[0])
        left, top = noise.integers(original.width - width + 1), noise.integers(original.height - height + 1)
        crop = original.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
        crop.save(out / "images" / "0" / f"{number:05d}.jpg", quality=95)


def folder(out: Path, workers: int) -> Iterable:
    crop = transforms.RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
    steps = [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    data = datasets.ImageFolder(out / "images", transforms.Compose(steps))
    return DataLoader(data, BATCH, shuffle=True, num_workers=workers, drop_last=True)


def webdataset(out: Path, workers: int) -> Iterable:
    crop = v2.RandomResizedCrop(224, (0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    steps = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def read(sample: dict) -> tuple[torch.Tensor, int]:
        pixels = torch.from_numpy(simplejpeg.decode_jpeg(sample["jpg"], "RGB")).permute(2, 0, 1)
        return steps(pixels), int(sample["cls"])

    shards = sorted(map(str, (out / "shards").glob("*.tar")))
    data = wds.WebDataset(shards, shardshuffle=100, seed=0, nodesplitter=wds.split_by_node).shuffle(1000).map(read)  # type: ignore
    return wds.WebLoader(data.batched(BATCH, partial=False), batch_size=None, num_workers=workers)  # type: ignore


def ours(out: Path, workers: int, shards: str = "shards", step: int = 0, batch: int = BATCH, **settings) -> DataLoader:
    config = DataConfig(path=str(out / shards), workers=workers, **settings)
    shape = {"image_size": (224, 224), "channels": 3, "global_batch": batch, "micro_batch": batch}
    return ShardDataModule(config, seed=0, **shape).train_loader(lambda: step)


LOADERS: dict[str, Callable[[Path], Iterable]] = {
    "folder": lambda out: folder(out, WORKERS),
    "wds": lambda out: webdataset(out, WORKERS),
    "ours, exact": lambda out: ours(out, WORKERS, decode="exact"),
    "ours, fast": lambda out: ours(out, WORKERS),
    "ours, shorter side 512": lambda out: ours(out, WORKERS, "small"),
    "folder, one core": lambda out: folder(out, 1),
    "ours, one core, four views": lambda out: ours(out, 1, views_per_image=4),
}
RATIOS = [
    ("ours, exact", "folder"),
    ("ours, exact", "wds"),
    ("ours, fast", "folder"),
    ("ours, fast", "wds"),
    ("ours, shorter side 512", "folder"),
    ("ours, one core, four views", "folder, one core"),
]


def images_per_second(loader: Iterable, seconds: float) -> float:
    """Returns images per second after the first two batches, epoch after epoch."""
    images, started = 0, 0.0
    for number, batch in enumerate(chain.from_iterable(repeat(loader))):
        if number == 2:
            started = time.perf_counter()
        elif number > 2:
            images += len(batch["images"] if isinstance(batch, dict) else batch[0])
            if time.perf_counter() - started > seconds:
                break
    return images / (time.perf_counter() - started)


def first_batches(out: Path, rounds: int) -> list[float]:
    """Returns the time to the first batch in the middle of an epoch relative to a fresh start, workers included."""
    seconds: dict[int, list[float]] = {0: [], sum(1 for _ in (out / "images" / "0").iterdir()) // BATCH // 2: []}
    for _ in range(rounds):
        for step, found in seconds.items():
            started = time.perf_counter()
            next(iter(ours(out, WORKERS, step=step)))
            found.append(time.perf_counter() - started)
    fresh, middle = seconds.values()
    return [one / other for one, other in zip(middle, fresh, strict=True)]


def overhead(out: Path) -> float:
    """Returns the share of a sample's time for order, index and reading: everything but decoding and resizing."""
    loader = ours(out, 0)
    dataset, micro_batches = loader.dataset, list(loader.sampler)
    assert isinstance(dataset, ShardDataset)
    images = dataset.empty_images(BATCH)
    dataset.empty_images = lambda count: images[:count]  # type: ignore[method-assign]  # as workers have it from the ring
    started = time.process_time()
    for micro_batch in micro_batches:
        dataset[micro_batch]
    whole = time.process_time() - started
    dataset.decode_views = lambda rows, data, uniforms: [(0, 0, 1, 1)] * len(rows)  # type: ignore[method-assign]
    started = time.process_time()
    for micro_batch in loader.sampler:
        dataset[micro_batch]
    return (time.process_time() - started) / whole


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--photos", type=Path, default=DATASETS / "large_photos")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name in arguments.sizes:
        with tempfile.TemporaryDirectory() as temporary:
            out = Path(temporary)
            make_images(arguments.photos, out, SIZES[name], COPIES[name])
            samples, classes, *_ = find_images(out / "images")
            pack(samples, out / "shards", name="x", classes=classes, shard_size=COPIES[name] // 8)
            size = sum(path.stat().st_size for path in (out / "images" / "0").iterdir()) / COPIES[name]
            pack(samples, out / "small", name="x", classes=classes, shard_size=COPIES[name] // 8, shorter_side=512)
            rates: dict[str, list[float]] = {contender: [] for contender in LOADERS}
            for _ in range(arguments.rounds):
                for contender, loader in LOADERS.items():
                    rates[contender].append(images_per_second(loader(out), arguments.seconds))
            middle, share = statistics.median(first_batches(out, arguments.rounds)), overhead(out)
            results[name] = {contender: statistics.median(values) for contender, values in rates.items()}
            print_results(name, size, rates)
            print(f"  first batch in the middle of an epoch / of a fresh start: {middle:.2f}")
            print(f"  order, index and reading: {share:.1%} of a sample's time")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


def print_results(name: str, size: float, rates: dict[str, list[float]]) -> None:
    """Prints medians, and median ratios within a round."""

    def ratio(one: str, other: str) -> str:
        return f"{statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True)):.2f}"

    print(f"\n{name}, {size / 1024:.0f} KB each, {WORKERS} workers")
    for contender, values in rates.items():
        print(f"  {contender:28} {statistics.median(values):8.0f} images/s")
    for one, other in RATIOS:
        print(f"  {one} / {other}: {ratio(one, other)}")


if __name__ == "__main__":
    main()
