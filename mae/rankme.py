"""RankMe: how many directions features really use, without any label."""

import torch
from torch import Tensor


def rankme(features: Tensor, eps: float = 1e-7) -> float:
    """The exponential of the entropy of the normalised singular values (Garrido et al. 2023, equation 1).

    features  [n, D]
    returns   from 1, all on one line, to min(n, D), all directions alike
    """
    singular = torch.linalg.svdvals(features.double())
    share = singular / singular.sum().clamp_min(eps) + eps
    return float(torch.exp(-(share * share.log()).sum()))
