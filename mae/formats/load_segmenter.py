"""`mae.load_segmenter`: a whole SAM from any file or folder that holds one; the warm start of a segmentation run."""

from pathlib import Path

from torch import Tensor

from mae.errors import CheckpointError, ConfigError
from mae.formats.hf_sam import OWN, SHARED
from mae.formats.load import load, load_strictly
from mae.formats.load_sam import load_sam
from mae.formats.opened import Opened, open_weights
from mae.formats.sam_names import PARTS, from_segment_anything
from mae.models.config import MAEConfig
from mae.models.execution import BlocksConfig
from mae.sam.config import SegmentConfig, build_segmenter, set_trainable
from mae.sam.convert import to_sam
from mae.sam.encoder import SamEncoder
from mae.sam.lora import merge_lora
from mae.sam.segmenter import Segmenter


def load_segmenter(path: str | Path | Opened) -> Segmenter:
    """Loads the whole SAM in `path`, in evaluation mode on the CPU, its LoRA weights merged.

    path  a run of task=segment or its checkpoint, a segment-anything .pth, the folder of a Hugging Face SamModel, or
          any of them already opened

    Raises CheckpointError if there is none.
    """
    opened, copy = open_weights(path), not isinstance(path, Opened)
    if opened.kind == "segmentation":
        return _load_own(opened, copy)
    if opened.run is not None:
        raise CheckpointError(f"{opened.path} is no checkpoint of task=segment")
    encoder, rest = load_sam(opened), prompt_and_mask_weights(opened)
    if not rest:
        raise CheckpointError(f"{opened.path} holds a SAM-style encoder without a prompt encoder and a mask decoder")
    model = Segmenter(encoder)
    load_strictly(model, rest | encoder.state_dict(prefix="encoder."), opened.path, copy)
    return model.eval()


def _load_own(opened: Opened, copy: bool) -> Segmenter:
    assert opened.run is not None
    recipe = opened.run["recipe"]
    task = SegmentConfig.model_validate(recipe["task"])
    model = build_segmenter(MAEConfig.model_validate(recipe["model"]), task, BlocksConfig())
    set_trainable(model, task)
    load_strictly(model, opened.weights, opened.path, copy)
    if task.encoder == "lora":
        merge_lora(model.encoder)
    return model.eval()


def prompt_and_mask_weights(opened: Opened) -> dict[str, Tensor]:
    """Returns prompt encoder and mask decoder of a SAM of another library, under our names; empty if it has none."""
    state = opened.weights
    if not opened.path.is_dir():
        return from_segment_anything(state)
    if opened.settings.get("model_type") != "sam":
        return {}
    positions = state.get(OWN, state.get(SHARED))
    assert positions is not None, f"{opened.path} is a SamModel without the embedding of positions"
    return {key: value for key, value in state.items() if key.startswith(PARTS)} | {OWN: positions}


def initialise_segmenter(model: Segmenter, path: Path) -> None:
    """Warm start of a fresh model, before LoRA is added to it.

    path  a masked autoencoder, a SAM-style encoder, or a whole SAM, whose other parts are taken too

    Raises CheckpointError or ConfigError if the encoder in it is of another architecture.
    """
    encoder, rest = _load_parts(path, model)
    config = model.encoder.config
    if encoder.config != config:
        theirs, ours = encoder.config.model_dump(), config.model_dump()
        differing = [f"{name} {theirs[name]} there, {ours[name]} here" for name in ours if theirs[name] != ours[name]]
        raise ConfigError(
            f"init_from={path} has another encoder: {', '.join(differing)}. Set model= and task. as there"
        )
    model.encoder.load_state_dict(encoder.state_dict())
    if rest:
        own = {key: value for key, value in model.state_dict().items() if key.startswith(PARTS)}
        if {key: value.shape for key, value in own.items()} != {key: value.shape for key, value in rest.items()}:
            raise CheckpointError(f"init_from={path} has another prompt encoder or mask decoder")
        model.load_state_dict(rest, strict=False)


def _load_parts(path: Path, model: Segmenter) -> tuple[SamEncoder, dict[str, Tensor]]:
    """Returns the encoder in `path`, converted to SAM style if need be, and the weights of the other parts, if any."""
    opened = open_weights(path)
    if opened.kind == "segmentation":
        whole = load_segmenter(opened)
        return whole.encoder, {key: value for key, value in whole.state_dict().items() if key.startswith(PARTS)}
    if opened.kind == "sam":
        return load_sam(opened), prompt_and_mask_weights(opened)
    config = model.encoder.config
    fields = ("image_size", "patch_size", "window", "global_blocks", "out_channels")
    # The heads are the one thing that weights of others do not say.
    return to_sam(load(opened, num_heads=config.num_heads), **{name: getattr(config, name) for name in fields}), {}
