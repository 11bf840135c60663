"""Accuracy of a fine-tuned classifier."""

from pathlib import Path
from typing import Literal

from mae.models.classifier import Classifier, topk_correct
from mae.probes.models_under_probe import ModelsUnderProbe, Want
from mae.probes.probe import Outcome, Probe, Row


class Classify(Probe, frozen=True):
    """Top-1 and top-5 accuracy on the test images (`probe=classify`)."""

    name: Literal["classify"]

    def refusal(self, probed: ModelsUnderProbe) -> str | None:
        if not isinstance(probed.models["trained"], Classifier):
            return "needs a fine-tuned classifier: train one with task=finetune"
        return super().refusal(probed)

    def wants(self, probed: ModelsUnderProbe) -> list[Want]:
        return [Want("test", "scores")]

    def measure(self, probed: ModelsUnderProbe, out: Path) -> Outcome:
        found = {name: probed.features(name, *self.wants(probed)) for name in probed.models}
        results = {
            name: {f"top{k}": topk_correct(scores.values, scores.labels, k) / len(scores.labels) for k in (1, 5)}
            for name, scores in found.items()
        }
        rows = [
            Row(f"{self.name}, top-{k}", *(f"{results[name][f'top{k}']:.2%}" for name in ("trained", "untrained")))
            for k in (1, 5)
        ]
        return Outcome(self.name, {**results, "test_images": len(found["trained"].labels)}, rows, [])
