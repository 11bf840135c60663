"""kNN probe: accuracy of a vote among the nearest training images by cosine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mae.pictures.draw import LETTER, add_caption, shown_range, stretch, tiles
from mae.probes.features import Features, number_classes
from mae.probes.models_under_probe import ModelsUnderProbe, Want
from mae.probes.probe import Fitted, Outcome, Probe, measure_accuracy

NEIGHBOURS_SHOWN = 8  # at most, for each test image in the picture
LETTERS = 16  # of the name of a class on an image
FRAMES = torch.tensor([[0.75, 0.75, 0.75], [0.12, 0.35, 0.85], [0.85, 0.2, 0.15]])  # grey, blue, red


def neighbours(train: Tensor, test: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns cosine and row of the k nearest in `train`, nearest first: [n, D], [m, D] -> [m, k], [m, k]."""
    train = F.normalize(train, dim=1)
    found = [(F.normalize(part, dim=1) @ train.T).topk(min(k, len(train)), dim=1) for part in test.split(1024)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def vote(similarity: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Returns the class of most neighbours; of classes with equal votes, the one of greater summed similarity.

    similarity, labels  [m, k]
    returns             [m]
    """
    # The similarities of all votes sum to less than 1, so they decide between equal numbers only.
    weight = 1 + similarity / (4 * similarity.shape[1])
    return similarity.new_zeros(len(similarity), classes).scatter_add_(1, labels, weight).argmax(1)


def knn_accuracy(train: Features, test: Features, k: int = 20) -> float:
    """Computes the share of test samples whose k nearest training samples vote for the right class."""
    train, test, classes = number_classes(train, test)
    similarity, nearest = neighbours(train.values, test.values, k)
    return float((vote(similarity, train.labels[nearest], classes) == test.labels).double().mean())


class KNN(Probe, frozen=True):
    """kNN probe (`probe=knn`)."""

    name: Literal["knn"]
    train_images: int | None = Field(None, ge=1)
    k: int = Field(20, ge=1)
    shown: int = Field(8, ge=1)

    def wants(self, probed: ModelsUnderProbe) -> list[Want]:
        return [Want("train", probed.pool, self.train_images), Want("test", probed.pool)]

    def measure(self, probed: ModelsUnderProbe, out: Path) -> Outcome:
        def fit(views: list[Features], test: Features) -> Fitted:
            return Fitted({"top1": knn_accuracy(views[0], test, self.k)})

        train, test = (probed.features("trained", want) for want in self.wants(probed))
        picture = self._draw(probed, train, test, out / "knn.png")
        outcome = measure_accuracy(self.name, probed, self.wants(probed), fit, [picture])
        count = len(train.labels)
        # That of the online probe is among fewer images.
        rows = [row._replace(measured=f"{row.measured} among {count:,} images") for row in outcome.rows]
        outcome = outcome._replace(rows=rows)
        if self.k > count:
            remark = f"{self.name}: k={self.k} is more than the {count:,} training images, all of which vote"
            return outcome._replace(remarks=(remark, *outcome.remarks))
        return outcome

    def _draw(self, probed: ModelsUnderProbe, train: Features, test: Features, path: Path) -> Path:
        """Draws some test images, evenly spread, each with its nearest training images by the trained encoder."""
        crops, samples = probed.crops("test", self.shown, test)
        some = test.take(samples)
        _, nearest = neighbours(train.values, some.values, min(self.k, NEIGHBOURS_SHOWN))
        images, shown = probed.images, shown_range(crops)

        def unit(some: Tensor) -> Tensor:
            return stretch(probed.pixels.unit(some), shown)

        rows = torch.stack([unit(images.crops("train", train.samples[row])[0]) for row in nearest])
        labels = torch.cat([some.labels[:, None], train.labels[nearest]], dim=1)
        names = dict(enumerate(images.class_names("train", "test")))
        written = [[names.get(label, "") for label in row] for row in labels.tolist()]
        draw_neighbours(unit(crops), rows, labels, written).save(path)
        return path


def draw_neighbours(
    images: Tensor, neighbours: Tensor, labels: Tensor, names: Sequence[Sequence[str]] = ()
) -> Image.Image:
    """Draws one row per image: itself, and its nearest neighbours, those of its class framed in blue, others in red.

    images      [B, C, H, W] in [0, 1]
    neighbours  [B, k, C, H, W]
    labels      [B, 1 + k], of the image and its neighbours
    names       [B][1 + k], of their classes, written on the images; empty if unknown
    """
    shown = tiles(rearrange(torch.cat([images[:, None], neighbours], dim=1), "b k c h w -> (b k) c h w"))
    frames = torch.where(labels == labels[:, :1], 1, 2)
    frames[:, 0] = 0
    frames = FRAMES[frames.flatten()]
    framed = frames[:, :, None, None].expand(-1, -1, shown.shape[-2] + 8, shown.shape[-1] + 8).clone()
    framed[:, :, 4:-4, 4:-4] = shown
    rows = rearrange(F.pad(framed, (2, 2, 2, 2), value=1.0), "(b k) c h w -> c (b h) (k w)", b=len(images))
    caption = [
        "Left: test images. Beside each: the training images whose features are nearest, nearest first.",
        "Blue frame: the same class as the test image. Red frame: another class.",
    ]
    size = max(LETTER, rows.shape[-1] // 70)  # readable where the whole picture is shown at the width of a page
    picture = add_caption(rows, caption, size)
    top, height, width = picture.height - rows.shape[1], framed.shape[-2] + 4, framed.shape[-1] + 4
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=max(LETTER, width // 14))
    for row, written in enumerate(names):
        for column, name in enumerate(written):
            place = column * width + 8, top + row * height + 7
            draw.text(place, name[:LETTERS], fill="white", stroke_width=2, stroke_fill="black", font=font)
    return picture
