"""`mae.load_sam`: a SAM-style image encoder from any file or folder that holds one."""

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from mae.errors import CheckpointError, ConfigError, first_sentence
from mae.formats import hf_sam, timm_folder
from mae.formats.load import load_strictly
from mae.formats.opened import Opened, open_weights
from mae.formats.sam_names import ENCODER, to_our_names
from mae.formats.segment_anything import infer_config
from mae.sam.encoder import SamConfig, SamEncoder


def load_sam(path: str | Path | Opened, *, like: SamConfig | None = None, **given: Any) -> SamEncoder:
    """Loads the SAM-style encoder in `path`, in evaluation mode on the CPU.

    path   a segment-anything .pth (a whole SAM, its image_encoder.* part, or the encoder's bare weights), own exports
           among them, the same weights as safetensors or in whatever a training program wraps round them, a folder (a
           Hugging Face SamModel or SamVisionModel, or an exported samvit_* of timm), a run of task=distill with
           task.student=sam, or any of them already opened
    like   an architecture whose windows are taken where the image is one window and the weights cannot say
    given  fields of SamConfig that the file cannot say: global_blocks and window, if the image is one window; for
           another image_size or in_channels the weights are resampled, as by `SamEncoder.at`

    Prints what was unwrapped, and what of the file was not used.

    Raises CheckpointError if the file is missing, damaged or holds something else (missing and left-over keys are
    named), ConfigError if `given` does not fit.
    """
    opened = open_weights(path)
    if opened.kind == "segmentation":
        raise CheckpointError(
            f"{opened.path} holds a whole SAM: read it with mae.load_segmenter, not with mae.load_sam"
        )
    resampled = {name: given.pop(name) for name in ("image_size", "in_channels") if name in given}
    try:
        state = {
            key.removeprefix(ENCODER): value
            for key, value in to_our_names(opened.weights).items()
            if key.startswith(ENCODER)
        }
        if opened.run is not None:
            config = SamConfig.model_validate(opened.run["recipe"]["sam"] | given)
        elif opened.path.is_dir():
            read = timm_folder.read_sam if "architecture" in opened.settings else hf_sam.read
            config = SamConfig.model_validate(read(opened.settings) | given)
        else:
            config = infer_config(state, given, like)
    except ValidationError as error:
        raise ConfigError(f"{opened.path}: {first_sentence(error)}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{opened.path}: {error}") from error
    with torch.device("meta"):
        model = SamEncoder(config)
    load_strictly(model, state, opened.path, copy=not isinstance(path, Opened))
    model.eval()
    return model.at(**resampled) if resampled else model
