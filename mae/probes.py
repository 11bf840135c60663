"""How much of the classes a frozen feature shows: nearest neighbours and a linear classifier."""

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional as F


def knn_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int = 20) -> float:
    """Share of test samples whose k nearest training samples by cosine vote for the right class.

    train [n, D], test [m, D]; labels int64. Equal votes go to the class of the greater summed similarity.
    """
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    right = 0
    for features, labels in zip(test.split(1024), test_labels.split(1024), strict=True):
        similarity, neighbours = (features @ train.T).topk(min(k, len(train)), dim=1)
        # A vote counts 1 and a little of its similarity, which decides between equal numbers only.
        votes = torch.zeros(len(features), classes).scatter_add_(1, train_labels[neighbours], 1 + similarity / (4 * k))
        right += int((votes.argmax(1) == labels).sum())
    return right / len(test)


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
