"""Masked autoencoders: models, objective, training and interchange of weights.

model = mae.load("runs/NAME")              # or a published .pth, a Hugging Face ViTMAE or ViT folder, a timm ViT
out = model(images, noise)                 # out.loss, out.pred, out.target, out.mask
encoder = mae.to_sam(model)                # the pre-trained weights in a SAM-style encoder
encoder = mae.load_sam("sam_vit_b.pth")    # the SAM-style encoder: encoder(images) is the image embedding
model = mae.load_segmenter("runs/NAME")    # a whole SAM, of a run of task=segment or of other libraries
model = mae.MaskedAutoencoder(mae.MAEConfig(width=384, depth=12, num_heads=6))

A name is imported when it is first used, so that `import mae.run` loads neither SAM nor any format.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# ruff: noqa: F401 (imported for type checkers alone)
if TYPE_CHECKING:
    from mae.errors import CheckpointError, ConfigError
    from mae.formats.load import load
    from mae.formats.load_sam import load_sam
    from mae.formats.load_segmenter import load_segmenter
    from mae.models.classifier import Classifier
    from mae.models.config import MAEConfig
    from mae.models.mae import MaskedAutoencoder, Output, Reconstruction
    from mae.models.vit import Encoder
    from mae.sam.convert import to_sam
    from mae.sam.encoder import SamConfig, SamEncoder

_HOMES = {
    "CheckpointError": "errors",
    "Classifier": "models.classifier",
    "ConfigError": "errors",
    "Encoder": "models.vit",
    "MAEConfig": "models.config",
    "MaskedAutoencoder": "models.mae",
    "Output": "models.mae",
    "Reconstruction": "models.mae",
    "SamConfig": "sam.encoder",
    "SamEncoder": "sam.encoder",
    "load": "formats.load",
    "load_sam": "formats.load_sam",
    "load_segmenter": "formats.load_segmenter",
    "to_sam": "sam.convert",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mae' has no attribute {name!r}")
    return getattr(import_module(f"mae.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return list(_HOMES)
