"""Converts a masked autoencoder's encoder to a SAM-style one: weights copied, resampled, dropped or fresh."""

from pydantic import ValidationError

from mae.errors import ConfigError, first_sentence
from mae.models.config import MAEConfig
from mae.models.resample import grid_of_positions, resize_positions, resize_projection
from mae.models.vit import Encoder
from mae.sam.encoder import SamConfig, SamEncoder


def to_sam(encoder: Encoder, **given: object) -> SamEncoder:
    """Returns a SAM-style encoder with the weights of a masked autoencoder's encoder, for fine-tuning.

    given  fields of SamConfig in place of SAM's: image_size (1024), patch_size (16), window (14), global_blocks (the
           last block of each quarter), out_channels (256)

    The class token, its position, the final norm and a classifier's head are dropped; positions are resized bicubically
    to the new grid, the patch projection by pseudo-inverse; relative positions start at zero and the neck is fresh.
    Without a class token, on an image that is one window, the result before its neck is the encoder before its final
    norm.

    Raises ConfigError if the fields do not fit the encoder.
    """
    config = sam_config(encoder.config, given)
    model = SamEncoder(config)
    own = model.state_dict()
    dropped = ("cls_token", "norm.", "fc_norm.", "head.", "pos_embed", "mask_token", "decoder_")
    weights = {key: value for key, value in encoder.state_dict().items() if not key.startswith(dropped)}
    carried = {key.replace(".mlp.fc", ".mlp.lin"): value for key, value in weights.items()}
    carried["pos_embed"] = resize_positions(grid_of_positions(encoder), config.grid)
    carried["patch_embed.proj.weight"] = resize_projection(carried["patch_embed.proj.weight"], config.patch_size)
    fresh = [key for key in own if key not in carried and not key.startswith("neck.") and ".attn.rel_pos_" not in key]
    assert not fresh and carried.keys() <= own.keys(), f"nothing is carried over to {fresh}"
    model.load_state_dict(own | carried)
    return model.train(encoder.training)


def sam_config(config: MAEConfig, given: dict[str, object]) -> SamConfig:
    """Returns the architecture of the SAM-style encoder; `given` as in `to_sam`, and the same errors."""
    carried = config.model_dump(include={"in_channels", "width", "depth", "num_heads", "mlp_ratio"})
    differing = [name for name in carried if name in given and given[name] != carried[name]]
    if differing:
        raise ConfigError(
            f"{differing[0]} is {carried[differing[0]]} in the encoder and cannot be {given[differing[0]]}"
        )
    if "global_blocks" not in given:
        if config.depth % 4:
            raise ConfigError(
                f"depth={config.depth} has no quarters whose last block could be global: give global_blocks="
            )
        given = given | {"global_blocks": tuple(config.depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4))}
    try:
        return SamConfig.model_validate(carried | given)
    except ValidationError as error:
        raise ConfigError(first_sentence(error)) from error
