"""Linear probe: accuracy of a linear classifier on features, fitted by L-BFGS or as in the paper (LARS)."""

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from mae.probes.features import Features
from mae.probes.held_out import Choice, choose
from mae.probes.lars import LarsConfig, lars_accuracy
from mae.probes.models_under_probe import ModelsUnderProbe, Want
from mae.probes.probe import Fitted, Outcome, Probe, measure_accuracy


def linear_accuracy(train: Features, test: Features, strengths: list[float], seed: int = 0) -> tuple[float, Choice]:
    """Returns the test accuracy of logistic regression (L-BFGS) on standardised features, and its strength C.

    C is chosen from `strengths` and beyond on held-out training samples, then the classifier is fitted to all.
    """
    x, y = train.values.numpy(), train.labels.numpy()

    def accuracies(values: list[float], *rows: Tensor) -> list[float]:
        fit, held = (part.numpy() for part in rows)  # NumPy takes a tensor of one row for a number
        return [float(_classifier(value).fit(x[fit], y[fit]).score(x[held], y[held])) for value in values]

    best = Choice(strengths[0])
    if len(strengths) > 1:
        best = choose("C", strengths, train.labels, seed, accuracies)
    accuracy = _classifier(best.value).fit(x, y).score(test.values.numpy(), test.labels.numpy())
    return float(accuracy), best


def _classifier(strength: float):
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=5000, tol=1e-3))


class Linear(Probe, frozen=True):
    """Linear probe (`probe=linear`).

    fit        "lbfgs": logistic regression; "lars": the paper's, on augmented images
    strengths  values of C, of which L-BFGS takes the best on held-out images; they go on while it is at their end
    """

    name: Literal["linear"]
    train_images: int | None = Field(10_000, ge=2)
    fit: Literal["lbfgs", "lars"] = "lbfgs"
    strengths: list[PositiveFloat] = Field(min_length=1)
    lars: LarsConfig

    def wants(self, probed: ModelsUnderProbe) -> list[Want]:
        views = range(self.lars.views) if self.fit == "lars" else [None]
        train = [Want("train", probed.pool, self.train_images, view) for view in views]
        return [*train, Want("test", probed.pool)]

    def measure(self, probed: ModelsUnderProbe, out: Path) -> Outcome:
        def fit_lars(views: list[Features], test: Features) -> Fitted:
            accuracy, best = lars_accuracy(views, test, self.lars, probed.seed, probed.device)
            return Fitted({"top1": accuracy, "base_lr": best.value}, best.remark)

        def fit_lbfgs(views: list[Features], test: Features) -> Fitted:
            accuracy, best = linear_accuracy(views[0], test, self.strengths, probed.seed)
            return Fitted({"top1": accuracy, "C": best.value}, best.remark)

        title, fit = ("linear_lars", fit_lars) if self.fit == "lars" else ("linear", fit_lbfgs)
        return measure_accuracy(title, probed, self.wants(probed), fit)
