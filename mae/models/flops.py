"""FLOPs by formula: matrix products only, a multiply-add counted as two."""

from mae.models.config import MAEConfig


def pretraining_flops(config: MAEConfig) -> int:
    """Returns the FLOPs of the published algorithm per image, forward and backward, for the MFU.

    The encoder gets the visible patches, the decoder all patches, a cross decoder the predicted ones. The backward pass
    has two products for each one of the forward pass. The count depends on the model alone, whatever an implementation
    leaves out or recomputes.
    """
    return 3 * pretraining_forward(config, last_queries=config.patches + config.class_tokens)


def classification_flops(config: MAEConfig, classes: int) -> int:
    """Returns the FLOPs of a classifier per image, forward and backward, the encoder on all patches."""
    return 3 * classification_forward(config, classes)


def classification_forward(config: MAEConfig, classes: int) -> int:
    tokens = config.patches + config.class_tokens
    flops = linear(config.patches, config.patch_values, config.width) + linear(1, config.width, classes)
    return flops + config.depth * _block(tokens, tokens, config.width, config.mlp_ratio)


def pretraining_forward(config: MAEConfig, last_queries: int) -> int:
    """Counts the forward pass of one image; the last self-attention block of the decoder has `last_queries` queries."""
    visible, every = config.visible + config.class_tokens, config.patches + config.class_tokens
    width, decoder = config.width, config.decoder_width
    flops = linear(config.visible, config.patch_values, width)
    flops += config.depth * _block(visible, visible, width, config.mlp_ratio)
    flops += linear(visible, width, decoder)
    if config.decoder == "cross":
        flops += config.decoder_depth * _block(visible, config.predictions, decoder)
        return flops + linear(config.predictions, decoder, config.patch_values)
    flops += (config.decoder_depth - 1) * _block(every, every, decoder)
    flops += _block(every, last_queries, decoder)
    return flops + linear(last_queries, decoder, config.patch_values)


def _block(keys: int, queries: int, width: int, mlp_ratio: float = 4.0) -> int:
    """Counts a transformer block with outputs for `queries` tokens, which attend to `keys` tokens."""
    projections = 2 * linear(queries, width, width) + 2 * linear(keys, width, width)
    return projections + attention(queries, keys, width) + 2 * linear(queries, width, int(width * mlp_ratio))


def attention(queries: int, keys: int, width: int) -> int:
    return 2 * linear(queries, keys, width)


def linear(rows: int, inner: int, outer: int) -> int:
    return 2 * rows * inner * outer
