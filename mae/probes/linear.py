"""How much of the classes a linear classifier finds in a feature: quickly by L-BFGS, or in the manner of the paper."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from mae.probes.lars import LarsConfig, lars_accuracy
from mae.probes.models_under_probe import Subject, Want
from mae.probes.probe import Outcome, accuracies


def linear_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, strengths: list[float], seed: int = 0
) -> tuple[float, float]:
    """Test accuracy of logistic regression (L-BFGS) on standardised features, and the strength C that it used.

    C is chosen from `strengths` on a held-out fifth of the training samples, then the classifier is fitted on all.
    """
    x, y = train.numpy(), train_labels.numpy()
    fit_x, held_x, fit_y, held_y = train_test_split(x, y, test_size=0.2, random_state=seed)
    best = max(strengths, key=lambda c: _classifier(c).fit(fit_x, fit_y).score(held_x, held_y))
    accuracy = _classifier(best).fit(x, y).score(test.numpy(), test_labels.numpy())
    return float(accuracy), best


def _classifier(strength: float):
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=5000, tol=1e-3))


class Linear(BaseModel):
    """A linear classifier.

    fit        "lbfgs": logistic regression; "lars": the paper's, on augmented images
    strengths  of which L-BFGS takes the best on held-out training images
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["linear"]
    train_images: int | None = Field(10_000, ge=2)
    fit: Literal["lbfgs", "lars"] = "lbfgs"
    strengths: list[float] = Field(min_length=1)
    lars: LarsConfig

    def refusal(self, subject: Subject) -> str | None:
        return subject.lacks_labels(Want("train", subject.pool, self.train_images), Want("test", subject.pool))

    def wants(self, subject: Subject) -> list[Want]:
        return [*self._train(subject), Want("test", subject.pool)]

    def _train(self, subject: Subject) -> list[Want]:
        views = range(self.lars.views) if self.fit == "lars" else [None]
        return [Want("train", subject.pool, self.train_images, view) for view in views]

    def measure(self, subject: Subject, out: Path) -> Outcome:
        results, train_images, test_images = {}, 0, 0
        for name in subject.models:
            train = [subject.features(name, want) for want in self._train(subject)]
            test = subject.features(name, Want("test", subject.pool))
            train_images, test_images = len(train[0].labels), len(test.labels)
            if self.fit == "lars":
                views = [features.values for features in train]
                accuracy = lars_accuracy(
                    views, train[0].labels, test.values, test.labels, self.lars, subject.seed, subject.device
                )
                results[name] = {"top1": accuracy}
            else:
                accuracy, strength = linear_accuracy(
                    train[0].values, train[0].labels, test.values, test.labels, self.strengths
                )
                results[name] = {"top1": accuracy, "C": strength}
        title = "linear" if self.fit == "lbfgs" else "linear_lars"
        return accuracies(title, results, train_images, test_images, [])
