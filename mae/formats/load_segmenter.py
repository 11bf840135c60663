"""A whole SAM from any file or folder that holds one, and the warm start of a segmentation run."""

from pathlib import Path

from torch import Tensor

from mae.errors import CheckpointError, ConfigError
from mae.formats.detect import _task, holds_sam, is_segmentation
from mae.formats.hf_sam import OWN, SHARED
from mae.formats.huggingface import read_settings, read_weights
from mae.formats.load import load, load_strictly, model_weights
from mae.formats.load_sam import load_sam
from mae.formats.sam_names import PARTS, from_segment_anything
from mae.models.config import MAEConfig
from mae.models.execution import BlocksConfig
from mae.run.checkpoint_files import newest_valid, read
from mae.sam.config import SegmentConfig, build_segmenter, choose_what_learns
from mae.sam.convert import to_sam
from mae.sam.encoder import SamEncoder
from mae.sam.lora import merge_lora
from mae.sam.segmenter import Segmenter


def load_segmenter(path: str | Path) -> Segmenter:
    """The whole SAM in `path`, in evaluation mode on the CPU; low-rank additions are merged into its weights.

    path  a run of task=segment or its checkpoint, a segment-anything .pth, or the folder of a Hugging Face SamModel

    Raises CheckpointError when there is none.
    """
    path = Path(path)
    if path.is_dir() and not (path / "config.json").is_file():
        newest = newest_valid(path)
        if newest is None:
            raise CheckpointError(f"{path} is neither a run with checkpoints nor a Hugging Face folder")
        path = newest
    if path.suffix == ".ckpt":
        return _own(path)
    encoder, rest = load_sam(path), prompt_and_mask_weights(path)
    if not rest:
        raise CheckpointError(f"{path} holds a SAM-style encoder without a prompt encoder and a mask decoder")
    model = Segmenter(encoder)
    load_strictly(model, rest | {f"encoder.{key}": value for key, value in encoder.state_dict().items()}, path)
    return model.eval()


def _own(path: Path) -> Segmenter:
    contents = read(path)
    if _task(contents) != "segment":
        raise CheckpointError(f"{path} is no checkpoint of task=segment")
    recipe = contents["mae"]["recipe"]
    task = SegmentConfig.model_validate(recipe["task"])
    model = build_segmenter(MAEConfig.model_validate(recipe["model"]), task, BlocksConfig())
    choose_what_learns(model, task)
    load_strictly(model, model_weights(contents), path)
    if task.encoder == "lora":
        merge_lora(model.encoder)
    return model.eval()


def prompt_and_mask_weights(path: Path) -> dict[str, Tensor]:
    """Prompt encoder and mask decoder of a whole SAM, under our names; empty for a file with an encoder alone."""
    if not path.is_dir():
        contents = read(path)
        return from_segment_anything(contents.get("model", contents))
    if read_settings(path).get("model_type") != "sam":
        return {}
    state = read_weights(path)
    positions = state.get(OWN, state.get(SHARED))
    assert positions is not None, f"{path} is a SamModel without the embedding of positions"
    kept = {key: value for key, value in state.items() if key.startswith(PARTS)}
    return kept | {OWN: positions}


def initialise_segmenter(model: Segmenter, path: Path) -> None:
    """Warm start of a fresh model, before anything is added to it.

    path  anything that holds a masked autoencoder, a SAM-style encoder, or a whole SAM: then also of its other parts

    Raises CheckpointError or ConfigError when the encoder in it is of another architecture.
    """
    encoder, rest = _parts(path, model)
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


def _parts(path: Path, model: Segmenter) -> tuple[SamEncoder, dict[str, Tensor]]:
    if is_segmentation(path):
        whole = load_segmenter(path)
        return whole.encoder, {key: value for key, value in whole.state_dict().items() if key.startswith(PARTS)}
    if holds_sam(path):
        return load_sam(path), prompt_and_mask_weights(path)
    config = model.encoder.config
    fields = ("image_size", "patch_size", "window", "global_blocks", "out_channels")
    # The heads are the one thing that weights of others do not say.
    return to_sam(load(path, num_heads=config.num_heads), **{name: getattr(config, name) for name in fields}), {}
