"""Floating-point operations by formula: products of matrices only, a multiply-add counted as two."""

from mae.models.config import MAEConfig


def pretraining_flops(config: MAEConfig) -> int:
    """Forward and backward of one image as the paper has it: the encoder on visible patches, the decoder on all; a
    cross decoder on the predicted ones.

    The backward pass makes two products for each of the forward. This is the count to divide by for a utilisation: it
    depends on the model alone, whatever an implementation leaves out or computes twice.
    """
    return 3 * _pretraining_forward(config, last_queries=_decoder_tokens(config))


def executed_pretraining_flops(config: MAEConfig) -> int:
    """What `MaskedAutoencoder` computes of that: its last block of self-attention has the hidden patches for queries
    only, and pixels get no gradient.
    """
    hidden = config.patches - config.visible
    forward = _pretraining_forward(config, last_queries=hidden)
    return 3 * forward - linear(config.visible, config.patch_values, config.width)


def classification_flops(config: MAEConfig, classes: int) -> int:
    """Forward and backward of one image through a classifier, the encoder on all patches."""
    return 3 * _classification_forward(config, classes)


def executed_classification_flops(config: MAEConfig, classes: int) -> int:
    """What is computed of that: pixels get no gradient."""
    return 3 * _classification_forward(config, classes) - linear(config.patches, config.patch_values, config.width)


def _classification_forward(config: MAEConfig, classes: int) -> int:
    tokens = config.patches + config.class_token
    flops = linear(config.patches, config.patch_values, config.width) + linear(1, config.width, classes)
    return flops + config.depth * _block(tokens, tokens, config.width, config.mlp_ratio)


def _pretraining_forward(config: MAEConfig, last_queries: int) -> int:
    """Forward of one image, the last decoder block, if it is of self-attention, with outputs for `last_queries`."""
    visible, every = config.visible + config.class_token, _decoder_tokens(config)
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


def _decoder_tokens(config: MAEConfig) -> int:
    return config.patches + config.class_token


def _block(keys: int, queries: int, width: int, mlp_ratio: float = 4.0) -> int:
    """A transformer block that computes the outputs of `queries` tokens, which attend to `keys`."""
    projections = 2 * linear(queries, width, width) + 2 * linear(keys, width, width)
    return projections + attention(queries, keys, width) + 2 * linear(queries, width, int(width * mlp_ratio))


def attention(queries: int, keys: int, width: int) -> int:
    return 2 * linear(queries, keys, width)


def linear(rows: int, inner: int, outer: int) -> int:
    return 2 * rows * inner * outer
