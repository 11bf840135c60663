"""Scores of dense predictions: mean intersection over union over a set, errors of depths."""

from typing import NamedTuple

import numpy as np

from mae.probes.dense_targets import Classes


def count_pixels(truth: np.ndarray, predicted: np.ndarray, classes: Classes) -> np.ndarray:
    """Counts the pixels of each class by what is predicted for them: [H, W], [H, W] -> int64 [C truth, C predicted].

    Those whose truth is void are not counted.
    """
    known = truth != classes.void
    numbers = truth[known].astype(np.int64) * classes.count + predicted[known]
    return np.bincount(numbers, minlength=classes.count**2).reshape(classes.count, classes.count)


def segmentation_scores(confusion: np.ndarray, classes: Classes) -> dict[str, float | list[float | None]]:
    """Computes scores from the counts of `count_pixels` over a whole set.

    returns  miou, accuracy (of pixels), class_accuracy (mean of the classes) and iou of each class but void, None for
             one that is neither in the truth nor predicted; the means leave out such classes, as is usual
    """
    right, truth, said = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    union = truth + said - right
    scored = classes.scored
    iou = [float(right[number] / union[number]) if union[number] else None for number in scored]
    found = [value for value in iou if value is not None]
    recalls = [right[number] / truth[number] for number in scored if truth[number]]
    return {
        "miou": float(np.mean(found)),
        "accuracy": float(right.sum() / confusion.sum()),
        "class_accuracy": float(np.mean(recalls)),
        "iou": iou,
    }


class DepthErrors(NamedTuple):
    """Errors of the depths of one photograph, means over its pixels of known depth (Eigen et al. 2014)."""

    delta1: float  # share of the pixels whose depth is off by less than a factor of 1.25
    abs_rel: float  # absolute error by the true depth
    rmse: float  # in metres


def depth_errors(truth: np.ndarray, predicted: np.ndarray) -> DepthErrors | None:
    """Computes the errors of predicted depths [H, W] in metres; None where no pixel has a known depth."""
    known = truth > 0
    if not known.any():
        return None
    depth, found = truth[known].astype(np.float64), predicted[known].astype(np.float64)
    error = np.abs(found - depth)
    return DepthErrors(
        float((np.maximum(found / depth, depth / found) < 1.25).mean()),
        float((error / depth).mean()),
        float(np.sqrt((error**2).mean())),
    )


def mean_errors(errors: list[DepthErrors]) -> dict[str, float]:
    """Averages the errors of photographs."""
    means = np.mean(np.array(errors, np.float64), axis=0)
    return dict(zip(DepthErrors._fields, means.tolist(), strict=True))
