"""Accuracy of a fine-tuned classifier."""

from pathlib import Path
from typing import Literal

from mae.distributed.rank_zero import warn
from mae.models.classifier import Classifier, topk_correct
from mae.probes.models_under_probe import ModelsUnderProbe, Want
from mae.probes.probe import Outcome, Probe, Row, share_of_largest


class Classify(Probe, frozen=True):
    """Top-1 and top-5 accuracy on the test images (`probe=classify`)."""

    name: Literal["classify"]

    def refusal(self, probed: ModelsUnderProbe) -> str | None:
        model = probed.models["trained"]
        if not isinstance(model, Classifier):
            return "needs a fine-tuned classifier: train one with task=finetune"
        return super().refusal(probed) or self._other_classes(probed, model)

    def _other_classes(self, probed: ModelsUnderProbe, model: Classifier) -> str | None:
        """Returns where the classes of the test images are not those of the classifier; None if nothing shows that."""
        if not model.class_names and (differing := probed.images.differing_classes("train", "test")):
            return f"needs labels that mean what they meant in training: {differing}"
        own, theirs = self._class_names(probed), probed.images.class_names("test")
        label = next((label for label, pair in enumerate(zip(own, theirs, strict=False)) if len({*pair}) > 1), None)
        if label is not None and {*own} & {*theirs}:
            return (
                f"needs test images whose labels are the classifier's, and label {label} is {theirs[label]!r} in them "
                f"and {own[label]!r} in the classifier: pack them with the numbers of its training images (--classes)"
            )
        if label is not None:  # words in the one and WordNet's numbers in the other, for example
            warn(
                f"labels: {own[label]!r}, … in the classifier, {theirs[label]!r}, … in the images: numbers are compared"
            )
        highest = int(probed.images.labels("test", probed.images.samples("test", None)).max())
        if highest >= model.classes:
            return f"needs labels below {model.classes}, as many as the classifier has, and they go up to {highest}"
        return None

    def _class_names(self, probed: ModelsUnderProbe) -> list[str]:
        """Returns the names of the classifier, else those of its training images."""
        model = probed.models["trained"]
        assert isinstance(model, Classifier)
        return model.class_names or probed.images.class_names("train", "test")

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
        labels = found["trained"].labels
        largest = share_of_largest(labels, labels)
        rows[0] = rows[0]._replace(trivial=f"largest class {largest:.2%}")
        about = {"test_images": len(labels), "classes": self._class_names(probed), "floors": {"largest class": largest}}
        return Outcome(self.name, {**results, **about}, rows, [])
