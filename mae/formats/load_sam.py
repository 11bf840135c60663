"""`mae.load_sam`: a SAM-style image encoder from any file or folder that holds one."""

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from mae.errors import CheckpointError, ConfigError, first_sentence
from mae.formats import timm_sam
from mae.formats.hf_sam import read_sam
from mae.formats.huggingface import read_settings
from mae.formats.load import load_strictly
from mae.formats.segment_anything import encoder_weights, infer_config
from mae.run.checkpoint_files import read
from mae.sam.encoder import SamConfig, SamEncoder


def load_sam(path: str | Path, **given: Any) -> SamEncoder:
    """The SAM-style encoder in `path`, in evaluation mode on the CPU.

    path   a segment-anything .pth (a whole SAM, its image_encoder.* part, or the encoder's bare weights), own exports
           among them, or a folder: a Hugging Face SamModel or SamVisionModel, or an exported samvit_* of timm
    given  fields of SamConfig that the file cannot say: global_blocks and window, when the image is one window

    Raises CheckpointError when the file is missing, damaged or holds something else (missing and left-over keys are
    named), ConfigError when `given` does not fit.
    """
    path = Path(path)
    contents = None if path.is_dir() else read(path)
    try:
        if contents is None:
            fields, state = _read_folder(path)
            config = SamConfig.model_validate(fields | given)
        else:
            state = encoder_weights(contents)
            config = infer_config(state, given)
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_sentence(error)}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    with torch.device("meta"):
        model = SamEncoder(config)
    load_strictly(model, state, path)
    return model.eval()


def _read_folder(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    settings = read_settings(path)
    return timm_sam.read(path, settings) if "architecture" in settings else read_sam(path, settings)
