"""Masked autoencoders: models, objective, training and interchange of weights.

model = mae.load("runs/NAME")              # or a published .pth, a Hugging Face ViTMAE or ViT folder, a timm ViT
out = model(images, noise)                 # out.loss, out.pred, out.target, out.mask
encoder = mae.load_sam("sam_vit_b.pth")    # the SAM-style encoder: encoder(images) is the image embedding
model = mae.load_segmenter("runs/NAME")    # a whole SAM, of a run of task=segment or of other libraries
model = mae.MaskedAutoencoder(mae.MAEConfig(width=384, depth=12, num_heads=6))
"""

from mae.errors import CheckpointError, ConfigError
from mae.formats.load import load
from mae.formats.load_sam import load_sam
from mae.formats.load_segmenter import load_segmenter
from mae.models.classifier import Classifier
from mae.models.config import MAEConfig
from mae.models.mae import MaskedAutoencoder, Output, Reconstruction
from mae.models.vit import Encoder
from mae.sam.encoder import SamConfig, SamEncoder

__all__ = [
    "CheckpointError",
    "Classifier",
    "ConfigError",
    "Encoder",
    "MAEConfig",
    "MaskedAutoencoder",
    "Output",
    "Reconstruction",
    "SamConfig",
    "SamEncoder",
    "load",
    "load_sam",
    "load_segmenter",
]
