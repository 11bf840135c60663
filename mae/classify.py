"""How often a classifier is right."""

from torch import Tensor


def hits(scores: Tensor, labels: Tensor, k: int) -> int:
    """For how many images [B, classes] the label [B] is among the k highest scores."""
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return int((best == labels[:, None]).sum())
