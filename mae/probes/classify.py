"""How often a fine-tuned classifier is right."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from mae.models.classifier import Classifier, topk_correct
from mae.probes.models_under_probe import Subject, Want
from mae.probes.probe import Outcome, Row


class Classify(BaseModel):
    """The share of test images whose label has the highest score, or one of the five highest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["classify"]

    def refusal(self, subject: Subject) -> str | None:
        if not isinstance(subject.models["trained"], Classifier):
            return "needs a fine-tuned classifier: train one with task=finetune"
        return subject.lacks_labels(*self.wants(subject))

    def wants(self, subject: Subject) -> list[Want]:
        return [Want("test", "scores")]

    def measure(self, subject: Subject, out: Path) -> Outcome:
        found = {name: subject.features(name, *self.wants(subject)) for name in subject.models}
        results = {
            name: {f"top{k}": topk_correct(scores.values, scores.labels, k) / len(scores.labels) for k in (1, 5)}
            for name, scores in found.items()
        }
        rows = [
            Row(f"{self.name}, top-{k}", *(f"{results[name][f'top{k}']:.2%}" for name in ("trained", "untrained")))
            for k in (1, 5)
        ]
        return Outcome(self.name, {**results, "test_images": len(found["trained"].labels)}, rows, [])
