"""Dense probe: segmentation or depth from frozen patch tokens (`probe=dense`).

1 extract  tokens of windows of whole photographs, on all ranks together              windows, dense_tokens
2 target   shares of classes, or mean log depth, in each patch                        dense_targets
3 fit      a linear head or the nearest tokens, on those of training photographs      dense_heads
4 predict  test photographs at their own size: windows resized, averaged, resized     here
5 score    counts over the whole set, beside the untrained encoder and a floor        dense_scores
6 draw     photograph, truth, predictions                                             dense_pictures
"""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange
from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, PrivateAttr
from torch import Tensor

from mae.distributed.rank_zero import is_rank_zero
from mae.errors import ConfigError
from mae.probes.dense_heads import (
    Head,
    NeighbourHead,
    Table,
    Target,
    Windows,
    fit_depths,
    fit_on_pixels,
    fit_on_tokens,
    predict_pixels,
)
from mae.probes.dense_pictures import colour_classes, colour_depths, draw_predictions
from mae.probes.dense_scores import count_pixels, depth_errors, mean_errors, segmentation_scores
from mae.probes.dense_targets import UNKNOWN, Classes, class_shares, find_classes, log_depths
from mae.probes.dense_tokens import FLOOR, Extraction, Mapped, TokenMaps, View, drawn_rows, thin
from mae.probes.models_under_probe import ModelsUnderProbe, Split, Want
from mae.probes.probe import Outcome, Probe, Row
from mae.probes.windows import Size, resize_nearest

HeadName = Literal["linear", "knn"]
Square = Annotated[Size, BeforeValidator(lambda side: (side, side) if isinstance(side, int) else side)]
MEASURED = {"classes": {"miou": "mean IoU"}, "depth": {"delta1": "δ1", "abs_rel": "abs rel"}}  # in the table
# Of protocol=pixio; the published settings name no other (Yang et al. 2025).
PIXIO_LR, PIXIO_DECAY, PIXIO_BATCH, PIXIO_EPOCHS = 2e-4, 0.01, 16, 60
PIXIO_STEPS = 10_000  # below which the head is far from converged; ADE20K takes 75,000


class Measured(NamedTuple):
    """Scores of a head on the tokens of one model, the counts behind them, and its predictions in the picture."""

    scores: dict[str, Any]
    confusion: np.ndarray | None
    pictured: dict[int, Tensor]


class Dense(Probe, frozen=True):
    """Dense probe (`probe=dense`).

    target        "classes" of data.label_maps, or "depth" of data.depth_maps
    protocol      "tokens": the linear head learns the shares of the classes in each patch; "pixio": each pixel, as
                  published by Yang et al. 2025, on all tokens of the training photographs
    size, window  see `View`
    layers        whose tokens are taken, behind each other
    tokens        of each training photograph, drawn from the seed
    bank          training tokens among which the k nearest are searched
    void          number of no class; None: as the manifest says, else 255
    depth_unit    metres of 1 in depth maps of whole numbers
    untrained     measure the untrained encoder too, which takes as long again
    shown         test photographs in the picture
    """

    name: Literal["dense"]
    target: Target = "classes"
    heads: list[HeadName] = Field(min_length=1)
    protocol: Literal["tokens", "pixio"] = "tokens"
    size: PositiveInt | Size | None = None
    window: Square | None = None
    layers: list[int] = Field(min_length=1)
    train_images: int | None = Field(None, ge=1)
    test_images: int | None = Field(None, ge=1)
    tokens: PositiveInt = 500
    bank: PositiveInt = 10_000
    k: PositiveInt = 20
    lr: PositiveFloat = 1e-2
    weight_decay: float = Field(0.01, ge=0)
    batch: PositiveInt = 2048
    steps: PositiveInt = 1500
    void: int | None = Field(None, ge=0, le=65535)
    depth_unit: PositiveFloat = 1e-3
    untrained: bool = True
    shown: int = Field(6, ge=0)
    _found: dict[Split, TokenMaps] = PrivateAttr(default_factory=dict)

    def refusal(self, probed: ModelsUnderProbe) -> str | None:
        config = probed.models["trained"].config
        if not probed.images.has("test"):
            return "needs test images: set data.val_path"
        if reason := probed.images.lacks_maps(self.target):
            return f"needs a map beside each photograph: {reason}"
        if self.protocol == "pixio" and self.target == "depth":
            return "protocol=pixio is of segmentation. Set probe.protocol=tokens for depth"
        if wrong := [layer for layer in self.layers if not 1 <= abs(layer) <= config.depth]:
            return (
                f"layers={self.layers} has {wrong[0]}, and this encoder has {config.depth} blocks, 1 … {config.depth}, "
                "or -1 for the last"
            )
        for name, sides in (("size", self.size if isinstance(self.size, tuple) else ()), ("window", self.window or ())):
            if wrong := [side for side in sides if side < 1 or side % config.patch_size]:
                return f"{name}={list(sides)} has {wrong[0]}, which patches of {config.patch_size} pixels do not divide"
        return None

    def wants(self, probed: ModelsUnderProbe) -> list[Want]:
        return []

    def extract(self, probed: ModelsUnderProbe) -> None:
        names = [name for name in probed.models if self.untrained or name == "trained"]
        extraction = Extraction(probed, self._view(probed), names, self.target, self.depth_unit)
        drawn = None if self.protocol == "pixio" else self.tokens
        self._found["train"] = extraction.collect("train", self.train_images, drawn, probed.seed)
        test = probed.images.samples("test", self.test_images)
        pictured = test[torch.linspace(0, len(test) - 1, min(self.shown, len(test))).round().long()].tolist()
        self._found["test"] = extraction.collect("test", self.test_images, None, probed.seed, pictured)
        if is_rank_zero():
            for split, found in self._found.items():
                if not found.photographs:
                    key, reason = found.left_out[0]
                    raise ConfigError(
                        f"probe=dense can use none of the {found.asked:,} photographs of {split}; the first is {key}: "
                        f"{reason}"
                    )

    def _view(self, probed: ModelsUnderProbe) -> View:
        return View(self.size, self.window, tuple(self.layers), probed.models["trained"].config.patch_size)

    def measure(self, probed: ModelsUnderProbe, out: Path) -> Outcome:
        classes = self._classes(probed) if self.target == "classes" else None
        train, test = self._found["train"], self._found["test"]
        measured: dict[HeadName, dict[str, Measured]] = {}
        for head in dict.fromkeys(self.heads):
            measured[head] = {
                name: self._measure_head(head, name, probed, classes) for name in test.tokens if name in train.tokens
            }
        numbers = self._numbers(measured, classes) | {
            "train_images": len(train.photographs),
            "test_images": len(test.photographs),
            "left_out": {split: [key for key, _ in found.left_out] for split, found in self._found.items()},
        }
        if classes is not None:
            self._write_counts(measured, classes, out / "dense")
            numbers |= {"classes": [classes.name(number) for number in classes.scored], "void": classes.void}
        pictures = [self._draw(probed, measured, classes, out / "dense.png")] if self.shown else []
        remarks = [_say_left_out(split, found) for split, found in self._found.items() if found.left_out]
        remarks += self._say_few_steps(probed)
        return Outcome(self.name, numbers, self._rows(measured), pictures, tuple(remarks))

    def _say_few_steps(self, probed: ModelsUnderProbe) -> list[str]:
        """Says if the published settings take few steps: their learning rate is made for many."""
        view = self._view(probed)
        windows = sum(len(view.places(photograph.shown)) for photograph in self._found["train"].photographs)
        steps = PIXIO_EPOCHS * (windows // min(windows, PIXIO_BATCH))
        if self.protocol != "pixio" or "linear" not in self.heads or steps >= PIXIO_STEPS:
            return []
        return [
            f"probe.protocol=pixio trained {steps:,} steps on {windows:,} windows, and its learning rate of "
            f"{PIXIO_LR:g} is made for {PIXIO_STEPS:,} and more: the linear scores are too low"
        ]

    def _classes(self, probed: ModelsUnderProbe) -> Classes:
        names, void = probed.images.naming("train")
        theirs, other = probed.images.naming("test")
        if names != theirs or void != other:
            raise ConfigError(
                "manifest.json of the training and of the test photographs name the classes of label maps differently: "
                "give both the same `classes` and `void`"
            )
        void = next((number for number in (self.void, void) if number is not None), UNKNOWN)
        truths = [photograph.truth for found in self._found.values() for photograph in found.photographs]
        return find_classes(truths, names, void)

    def _measure_head(self, kind: HeadName, name: str, probed: ModelsUnderProbe, classes: Classes | None) -> Measured:
        pooled = name != FLOOR and bool(probed.models[name].config.class_tokens)
        head = self._fit(kind, name, pooled, probed, classes)
        confusion = None if classes is None else np.zeros((classes.count, classes.count), np.int64)
        errors, pictured = [], {}
        for photograph, predicted in self._predict(head, name, pooled, probed):
            truth = photograph.truth.numpy()
            if classes is not None and confusion is not None:
                if classes.void < classes.count:
                    predicted[classes.void] = -torch.inf
                found = predicted.max(0).indices.cpu()  # several times as fast as argmax on CPUs
                confusion += count_pixels(truth, found.numpy(), classes)
            else:
                found = predicted[0].exp().cpu()
                errors += [error] if (error := depth_errors(truth, found.numpy())) else []
            if photograph.image is not None:
                pictured[photograph.sample] = found
        if classes is not None and confusion is not None:
            if not confusion.any():
                raise ConfigError(f"all pixels of the test photographs are void ({classes.void}): nothing is scored")
            return Measured(segmentation_scores(confusion, classes), confusion, pictured)
        if not errors:
            raise ConfigError("no test photograph has a pixel of known depth: nothing is scored")
        return Measured(mean_errors(errors), None, pictured)

    def _predict(
        self, head: Head, name: str, pooled: bool, probed: ModelsUnderProbe
    ) -> Iterator[tuple[Mapped, Tensor]]:
        """Yields each test photograph with what the head says of its pixels, [C, H, W]."""
        view, found = self._view(probed), self._found["test"]
        for photograph, rows in zip(found.photographs, found.rows(name), strict=True):
            places, shown = view.places(photograph.shown), photograph.shown
            tokens = rearrange(rows.to(probed.device), "(w n) d -> w n d", w=len(places))
            size: Size = (photograph.truth.shape[0], photograph.truth.shape[1])
            window, published = view.window or shown, self.protocol == "pixio"
            about = {"pooled": pooled, "align_corners": published}
            yield photograph, predict_pixels(head, tokens, places, view.grid(shown), window, shown, size, **about)

    def _fit(self, kind: HeadName, name: str, pooled: bool, probed: ModelsUnderProbe, classes: Classes | None) -> Head:
        if kind == "linear" and self.protocol == "pixio":
            assert classes is not None
            settings = {"lr": PIXIO_LR, "weight_decay": PIXIO_DECAY, "batch": PIXIO_BATCH, "epochs": PIXIO_EPOCHS}
            windows = self._windows(name, probed)
            about = {"pooled": pooled, "seed": probed.seed, "device": probed.device}
            return fit_on_pixels(windows, classes.count, classes.void, **settings, **about)
        table = self._table(name, pooled and kind == "linear", probed, classes)
        if kind == "linear" and self.target == "depth":
            return fit_depths(table).to(probed.device)
        if kind == "linear":
            settings = self.model_dump(include={"lr", "weight_decay", "batch", "steps"})
            return fit_on_tokens(table, **settings, seed=probed.seed, device=probed.device)
        rows = table.weights.nonzero().flatten()
        chosen = rows[torch.linspace(0, len(rows) - 1, min(self.bank, len(rows))).round().long()]
        bank, targets = table.values[chosen].to(probed.device), table.targets[chosen].to(probed.device)
        return NeighbourHead(bank, targets, self.k, cosine=name != FLOOR)

    def _table(self, name: str, pooled: bool, probed: ModelsUnderProbe, classes: Classes | None) -> Table:
        """Returns the drawn tokens of all training photographs with what their patches show."""
        view, found = self._view(probed), self._found["train"]
        values, targets, weights = [], [], []
        for photograph, rows in zip(found.photographs, found.rows(name), strict=True):
            places, shown = view.places(photograph.shown), photograph.shown
            chosen = drawn_rows(probed.seed, photograph.sample, view.tokens(shown), self.tokens)
            truth = resize_nearest(photograph.truth, shown)
            if self.protocol == "pixio":
                rows = thin(rearrange(rows, "(w n) d -> w n d", w=len(places)), chosen)
            values.append(rows)
            window = view.window or shown
            if classes is not None:
                share = class_shares(truth, places, window, view.patch, classes)[chosen]
                weight = share.sum(1)
            else:
                share, weight = (part[chosen] for part in log_depths(truth, places, window, view.patch))
            targets.append(share)
            weights.append(weight)
        table = Table(torch.cat(values), torch.cat(targets), torch.cat(weights))
        width = table.values.shape[1]
        if not table.weights.any():
            lacks = "of known depth" if classes is None else f"that is not void ({classes.void})"
            raise ConfigError(f"the {len(found.photographs):,} training photographs have no pixel {lacks}")
        return table if pooled else table._replace(values=table.values[:, : width // 2])

    def _windows(self, name: str, probed: ModelsUnderProbe) -> Windows:
        """Returns the windows of all training photographs. Raises ConfigError if their sizes differ."""
        view, found = self._view(probed), self._found["train"]
        sizes = {view.window or photograph.shown for photograph in found.photographs}
        if len(sizes) > 1:
            raise ConfigError(
                f"protocol=pixio trains on batches of windows of one size, and the photographs have {len(sizes)}: set "
                "probe.window, such as probe.window=512"
            )
        tokens, truths, size = [], [], sizes.pop()
        for photograph, rows in zip(found.photographs, found.rows(name), strict=True):
            places = view.places(photograph.shown)
            tokens.append(rearrange(rows, "(w n) d -> w n d", w=len(places)))
            truth = resize_nearest(photograph.truth, photograph.shown)
            truths += [truth[top : top + size[0], left : left + size[1]] for top, left in places]
        return Windows(torch.cat(tokens), torch.stack(truths), view.grid(size))

    def _numbers(self, measured: dict[HeadName, dict[str, Measured]], classes: Classes | None) -> dict[str, Any]:
        """Returns model -> score -> head -> value, and the floor's of the scores in the table."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for head, by_model in measured.items():
            for name, each in by_model.items():
                for score, value in each.scores.items():
                    if score == "iou" and classes is not None:
                        value = dict(zip([classes.name(number) for number in classes.scored], value, strict=True))
                    found.setdefault(name, {}).setdefault(score, {})[head] = value
        of_floor = found.pop(FLOOR)
        floors = {score: {head: {FLOOR: of_floor[score][head]} for head in measured} for score in MEASURED[self.target]}
        return {**found, "floor": of_floor, "floors": floors}

    def _rows(self, measured: dict[HeadName, dict[str, Measured]]) -> list[Row]:
        show: Callable[[float], str] = "{:.2%}".format if self.target == "classes" else "{:.4f}".format
        rows = []
        for head, by_model in measured.items():
            for score, title in MEASURED[self.target].items():
                said = {name: show(each.scores[score]) for name, each in by_model.items()}
                both = said["trained"], said.get("untrained", "")
                rows.append(Row(f"{self.name} {head}, {title}", *both, f"{FLOOR} {said[FLOOR]}"))
        return rows

    def _write_counts(self, measured: dict[HeadName, dict[str, Measured]], classes: Classes, folder: Path) -> None:
        """Writes a table of each head and model: a row for each true class, a column for each predicted one."""
        folder.mkdir(parents=True, exist_ok=True)
        names = [classes.name(number) for number in classes.scored]
        for head, by_model in measured.items():
            for model, each in by_model.items():
                assert each.confusion is not None
                with open(folder / f"confusion-{head}-{model.replace(' ', '-')}.csv", "w", newline="") as file:
                    writer = csv.writer(file)
                    writer.writerow(["true class", *names])
                    counts = each.confusion[np.ix_(classes.scored, classes.scored)].tolist()
                    writer.writerows([name, *row] for name, row in zip(names, counts, strict=True))

    def _draw(
        self,
        probed: ModelsUnderProbe,
        measured: dict[HeadName, dict[str, Measured]],
        classes: Classes | None,
        path: Path,
    ) -> Path:
        """Draws photograph, truth and the predictions of the first head."""
        head, by_model = next(iter(measured.items()))
        models = [name for name in ("trained", "untrained") if name in by_model]
        rows = []
        for photograph in self._found["test"].photographs:
            if photograph.image is None:
                continue
            maps = [photograph.truth, *(by_model[name].pictured[photograph.sample] for name in models)]
            resized = [resize_nearest(each, photograph.shown) for each in maps]
            if classes is not None:
                drawn = [colour_classes(each, classes) for each in resized]
            else:
                known = resized[0][resized[0] > 0]
                ends = (float(known.min()), float(known.max())) if len(known) else (1.0, 10.0)
                drawn = [colour_depths(each, *ends) for each in resized]
            rows.append([probed.pixels.unit(photograph.image), *drawn])
        titles = ["photograph", "truth", *(f"{name} ({head})" for name in models)]
        return draw_predictions(rows, titles, path, classes)


def _say_left_out(split: Split, found: TokenMaps) -> str:
    key, reason = found.left_out[0]
    return (
        f"left out: {len(found.left_out):,} of {found.asked:,} photographs of {split} without a map that fits, first "
        f"{key}: {reason}"
    )
