"""The interface of a probe, and its outcome."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel
from torch import Tensor

from mae.probes.features import Features
from mae.probes.models_under_probe import ModelsUnderProbe, Want


class Row(NamedTuple):
    """A line of the table."""

    measured: str
    trained: str
    untrained: str
    trivial: str = ""  # the same of trivial predictors


class Outcome(NamedTuple):
    """Result of a probe.

    name     of the probe, and of its file
    numbers  contents of NAME.json: "trained", "untrained" and whatever else
    remarks  sentences about how far the numbers can be trusted
    """

    name: str
    numbers: dict[str, Any]
    rows: list[Row]
    pictures: list[Path]
    remarks: tuple[str, ...] = ()


class Fitted(NamedTuple):
    """Result of a classifier: "top1" and what was chosen, and a sentence where the choice may not be the best."""

    numbers: dict[str, float]
    remark: str = ""


class Probe(BaseModel, ABC, frozen=True, extra="forbid"):
    """Settings of a probe, with what it needs and how it measures. Each has a file in mae/probes/."""

    name: str

    def refusal(self, probed: ModelsUnderProbe) -> str | None:
        """Returns why it cannot measure these models, as here for lack of labels; None if it can."""
        return probed.lacks_labels(self.wants(probed))

    @abstractmethod
    def wants(self, probed: ModelsUnderProbe) -> list[Want]:
        """Returns the features that it needs, which `probed.collect` finds on all ranks together."""

    def extract(self, probed: ModelsUnderProbe) -> None:
        """Extracts, on all ranks together, what is no features of `wants`: the tokens of whole photographs."""

    @abstractmethod
    def measure(self, probed: ModelsUnderProbe, out: Path) -> Outcome:
        """Measures, and writes pictures below `out`; rank 0 only."""


def measure_accuracy(
    name: str,
    probed: ModelsUnderProbe,
    wants: list[Want],
    fit: Callable[[list[Features], Features], Fitted],
    pictures: Sequence[Path] = (),
) -> Outcome:
    """Fits a classifier to the features of each model and tests it.

    wants  features of the training images, once or in several views, and last those of the test images
    fit    (views of the training images, test images) -> accuracy, and what was chosen
    """
    results, remarks = {}, []
    for model in probed.models:
        *train, test = (probed.features(model, want) for want in wants)
        results[model], remark = fit(train, test)
        if remark:
            remarks.append(f"{name}, {model}: {remark}")
    trained, untrained = (f"{results[model]['top1']:.2%}" for model in ("trained", "untrained"))
    train_labels, test_labels = (probed.features("trained", want).labels for want in (wants[0], wants[-1]))
    largest = share_of_largest(train_labels, test_labels)
    numbers = {**results, "train_images": len(train_labels), "test_images": len(test_labels)}
    numbers |= {"floors": {"largest class": largest}, "classes": probed.images.class_names("train", "test")}
    row = Row(f"{name}, top-1", trained, untrained, f"largest class {largest:.2%}")
    return Outcome(name, numbers, [row], list(pictures), tuple(remarks))


def share_of_largest(train_labels: Tensor, test_labels: Tensor) -> float:
    """Returns the accuracy of the predictor that always says the most frequent class of the training images."""
    return float((test_labels == train_labels.mode().values).double().mean())
