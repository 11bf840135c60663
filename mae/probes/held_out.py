"""Choice of a hyper-parameter by its accuracy on held-out training images."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

FURTHER = 6  # values that are tried beyond the ends of a list, at most


class Choice(NamedTuple):
    """The best of the values that were tried.

    remark  says that it lies at an end of them, so that others may be better, or why none was tried; else ""
    """

    value: float
    remark: str = ""


def choose(
    setting: str,
    values: Sequence[float],
    labels: Tensor,
    seed: int,
    accuracies: Callable[[list[float], Tensor, Tensor], list[float]],
) -> Choice:
    """Chooses the value with the highest accuracy on a held-out fifth of the training images; of equal ones the first.

    The list goes on beyond an end for as long as the best value is there, by the ratio of its last two values; a single
    value says no ratio, and is returned.

    setting     name of the values, for the remark
    values      positive
    labels      [n] of the training images
    accuracies  (values, rows to fit, rows held out) -> accuracy of each value
    """
    values = list(dict.fromkeys(values))
    rows = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=seed)
    fit, held = (torch.from_numpy(part) for part in rows)
    if len(labels[fit].unique()) < 2:
        few = f"{len(labels):,} training images are too few to hold some out"
        return Choice(values[0], f"{few}: {setting}={values[0]:g}, the first, is taken")
    found = dict(zip(values, accuracies(values, fit, held), strict=True))
    if len(values) == 1:
        return Choice(values[0])
    ascending = sorted(values)
    ratio = ascending[-1] / ascending[-2]
    for _ in range(FURTHER + 1):
        best = max(found, key=lambda value: found[value])
        if min(found) < best < max(found):
            return Choice(best)
        if len(found) < len(values) + FURTHER:
            further = float(f"{best * ratio if best == max(found) else best / ratio:.4g}")
            found[further] = accuracies([further], fit, held)[0]
    return Choice(
        best,
        f"{setting}={best:g} is the best of those tried, {min(found):g} to {max(found):g}, and at their end: "
        "values further out may be better",
    )
