"""Linear probe: accuracy of a linear classifier on features, fitted by L-BFGS or as in the paper (LARS)."""

from pathlib import Path
from typing import Literal

from pydantic import Field
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mae.probes.features import Features
from mae.probes.lars import LarsConfig, lars_accuracy
from mae.probes.models_under_probe import ModelsUnderProbe, Want
from mae.probes.probe import Outcome, Probe, measure_accuracy


def linear_accuracy(train: Features, test: Features, strengths: list[float], seed: int = 0) -> tuple[float, float]:
    """Returns the test accuracy of logistic regression (L-BFGS) on standardised features, and its strength C.

    C is chosen from `strengths` on a held-out fifth of the training samples, then the classifier is fitted to all. It
    is the first if there is no other, or if the rest of so few samples has one class alone.
    """
    x, y = train.values.numpy(), train.labels.numpy()
    fit_x, held_x, fit_y, held_y = train_test_split(x, y, test_size=0.2, random_state=seed)
    best = strengths[0]
    if len(strengths) > 1 and len(set(fit_y)) > 1:
        best = max(strengths, key=lambda c: _classifier(c).fit(fit_x, fit_y).score(held_x, held_y))
    accuracy = _classifier(best).fit(x, y).score(test.values.numpy(), test.labels.numpy())
    return float(accuracy), best


def _classifier(strength: float):
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=5000, tol=1e-3))


class Linear(Probe, frozen=True):
    """Linear probe (`probe=linear`).

    fit        "lbfgs": logistic regression; "lars": the paper's, on augmented images
    strengths  values of C, of which L-BFGS takes the best on held-out training images
    """

    name: Literal["linear"]
    train_images: int | None = Field(10_000, ge=2)
    fit: Literal["lbfgs", "lars"] = "lbfgs"
    strengths: list[float] = Field(min_length=1)
    lars: LarsConfig

    def wants(self, probed: ModelsUnderProbe) -> list[Want]:
        views = range(self.lars.views) if self.fit == "lars" else [None]
        train = [Want("train", probed.pool, self.train_images, view) for view in views]
        return [*train, Want("test", probed.pool)]

    def measure(self, probed: ModelsUnderProbe, out: Path) -> Outcome:
        def fit_lars(views: list[Features], test: Features) -> dict[str, float]:
            return {"top1": lars_accuracy(views, test, self.lars, probed.seed, probed.device)}

        def fit_lbfgs(views: list[Features], test: Features) -> dict[str, float]:
            accuracy, strength = linear_accuracy(views[0], test, self.strengths)
            return {"top1": accuracy, "C": strength}

        title, fit = ("linear_lars", fit_lars) if self.fit == "lars" else ("linear", fit_lbfgs)
        return measure_accuracy(title, probed, self.wants(probed), fit)
