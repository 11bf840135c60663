"""FLOPs that are computed of those of the published algorithms: matrix products only, a multiply-add as two."""

from mae.models.config import MAEConfig
from mae.models.flops import classification_forward, linear, pretraining_forward


def executed_pretraining_flops(config: MAEConfig) -> int:
    """Returns what `MaskedAutoencoder` computes of `pretraining_flops`: the last self-attention block of the decoder
    has only hidden patches as queries, and pixels get no gradient.
    """
    hidden = config.patches - config.visible
    forward = pretraining_forward(config, last_queries=hidden)
    return 3 * forward - linear(config.visible, config.patch_values, config.width)


def executed_classification_flops(config: MAEConfig, classes: int) -> int:
    """Returns what is computed of `classification_flops`: pixels get no gradient."""
    return 3 * classification_forward(config, classes) - linear(config.patches, config.patch_values, config.width)
