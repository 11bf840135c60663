"""What every probe says of itself, and what comes out of it."""

from pathlib import Path
from typing import Any, NamedTuple, Protocol

from mae.probes.models_under_probe import Subject, Want


class Row(NamedTuple):
    """A line of the table."""

    measured: str
    trained: str
    untrained: str
    trivial: str = ""  # what a predictor without parameters reaches


class Outcome(NamedTuple):
    """What a probe has found.

    name      of the probe, and of its file
    numbers   for the file: "trained", "untrained" and whatever else
    """

    name: str
    numbers: dict[str, Any]
    rows: list[Row]
    pictures: list[Path]


class Probe(Protocol):
    """The settings of a probe, which knows what it needs and measures it. One file each in mae/probes/."""

    @property
    def name(self) -> str: ...

    def model_dump(self, *, mode: str) -> dict[str, Any]: ...

    def refusal(self, subject: Subject) -> str | None:
        """Why it cannot be done on this subject; None where it can."""
        ...

    def wants(self, subject: Subject) -> list[Want]:
        """The features that it needs, which `subject.collect` finds on all ranks together."""
        ...

    def measure(self, subject: Subject, out: Path) -> Outcome:
        """Numbers and pictures, these written below `out`; rank 0 only."""
        ...


def accuracies(
    name: str, results: dict[str, dict[str, float]], train_images: int, test_images: int, pictures: list[Path]
) -> Outcome:
    """The outcome of a probe that tells classes: {"trained": {"top1": ...}, "untrained": ...}."""
    trained, untrained = (f"{results[model]['top1']:.2%}" for model in ("trained", "untrained"))
    numbers = {**results, "train_images": train_images, "test_images": test_images}
    return Outcome(name, numbers, [Row(f"{name}, top-1", trained, untrained)], pictures)
