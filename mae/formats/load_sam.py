"""`mae.load_sam`: a SAM-style image encoder from any file or folder that holds one."""

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from mae.errors import CheckpointError, ConfigError, first_sentence
from mae.formats import hf_sam, timm_folder
from mae.formats.load import load_strictly
from mae.formats.opened import Opened, open_weights
from mae.formats.segment_anything import encoder_weights, infer_config
from mae.sam.encoder import SamConfig, SamEncoder


def load_sam(path: str | Path | Opened, **given: Any) -> SamEncoder:
    """Loads the SAM-style encoder in `path`, in evaluation mode on the CPU.

    path   a segment-anything .pth (a whole SAM, its image_encoder.* part, or the encoder's bare weights), own exports
           among them, a folder (a Hugging Face SamModel or SamVisionModel, or an exported samvit_* of timm), or any of
           them already opened
    given  fields of SamConfig that the file cannot say: global_blocks and window, if the image is one window

    Raises CheckpointError if the file is missing, damaged or holds something else (missing and left-over keys are
    named), ConfigError if `given` does not fit.
    """
    opened = open_weights(path)
    if opened.kind == "segmentation":
        raise CheckpointError(
            f"{opened.path} holds a whole SAM: read it with mae.load_segmenter, not with mae.load_sam"
        )
    try:
        if opened.path.is_dir():
            read = timm_folder.read_sam if "architecture" in opened.settings else hf_sam.read
            fields, state = read(opened.settings, opened.weights)
            config = SamConfig.model_validate(fields | given)
        else:
            state = encoder_weights(opened.weights)
            config = infer_config(state, given)
    except ValidationError as error:
        raise ConfigError(f"{opened.path}: {first_sentence(error)}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{opened.path}: {error}") from error
    with torch.device("meta"):
        model = SamEncoder(config)
    load_strictly(model, state, opened.path, copy=not isinstance(path, Opened))
    return model.eval()
