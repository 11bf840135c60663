"""Names of mmpretrain's `VisionTransformer`, also in mmsegmentation, to ours. Its decoder of an MAE is not read."""

from torch import Tensor

PROJECTION = "patch_embed.projection.weight"
# Theirs, ours: parts of a key between dots, replaced from left to right.
NAMES = {
    "patch_embed.projection.": "patch_embed.proj.",
    ".ffn.layers.0.0.": ".mlp.fc1.",
    ".ffn.layers.1.": ".mlp.fc2.",
    "layers.": "blocks.",
    ".ln1.": ".norm1.",
    ".ln2.": ".norm2.",
}
LAST_NORM = ("ln1.", "norm1.")  # of new and of old releases


def to_our_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns an encoder's weights under our names; keys without a counterpart stay, for the loader to name."""
    return {_our_name(key): value for key, value in weights.items()}


def _our_name(key: str) -> str:
    """layers.0.ffn.layers.1.weight -> blocks.0.mlp.fc2.weight"""
    if key.startswith(LAST_NORM):
        return f"norm.{key.rpartition('.')[2]}"
    for theirs, ours in NAMES.items():
        key = key.replace(theirs, ours)
    return key
