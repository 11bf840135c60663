"""Teacher: a frozen encoder of any format that `mae.load` and `mae.load_sam` read, and its tokens of the images."""

import copy
import hashlib
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from mae.distill.loss import Tokens
from mae.distributed.rank_zero import say
from mae.errors import ConfigError
from mae.formats.load import load
from mae.formats.load_sam import load_sam
from mae.formats.load_segmenter import load_segmenter
from mae.formats.opened import Opened, open_weights, scale_of, scale_words
from mae.models.classifier import Classifier
from mae.models.pixels import Pixels
from mae.models.resample import at_image_size
from mae.models.vit import Encoder
from mae.sam.embedding_cache import OutputCache
from mae.sam.encoder import SamEncoder
from mae.sam.square_frame import blank_padding

# Settings of a decoder that files may not say: any will do, since a teacher is without it.
LEFT_OUT = {"norm_pix": True, "decoder_num_heads": 1}


def encode(encoder: Encoder | SamEncoder, images: Tensor) -> Tokens:
    """Encodes whole normalised images: tokens after the final norm, or the image embedding of a SAM-style encoder."""
    if isinstance(encoder, SamEncoder):
        embedding = rearrange(encoder(images), "b e h w -> b h w e")
        return Tokens(embedding.new_empty(len(images), 0, embedding.shape[-1]), embedding)
    latent, first = encoder.encode(images), encoder.config.class_tokens
    patches = rearrange(latent[:, first:], "b (h w) e -> b h w e", h=encoder.config.grid[0])
    return Tokens(latent[:, :first], patches)


class Teacher:
    """A frozen encoder in evaluation mode. No module of the run: never trained, averaged, sharded or saved.

    encoder      its config.image_size is the size that images are resized to
    pixels       scale of its own images
    path         where it was read
    fingerprint  hash of its weights as they were read, and of the scale of its images
    cache        keeps its tokens of the training images; None: they are computed each time

    Tokens are bfloat16 whether they are kept or not, so that a cache changes no result.
    """

    def __init__(
        self, encoder: Encoder | SamEncoder, pixels: Pixels, path: Path, cache: OutputCache | None = None
    ) -> None:
        self.encoder = encoder.eval().requires_grad_(False)
        self.pixels = pixels
        self.path = path
        self.fingerprint = fingerprint(encoder, pixels)
        self.cache = cache
        self.device: torch.device | None = None  # it moves to that of its first images

    @property
    def is_sam(self) -> bool:
        return isinstance(self.encoder, SamEncoder)

    @property
    def image_size(self) -> tuple[int, int]:
        return self.encoder.config.image_size

    @property
    def grid(self) -> tuple[int, int]:
        return self.encoder.config.grid

    @property
    def class_tokens(self) -> int:
        """Returns T, the number of class tokens."""
        return 0 if isinstance(self.encoder, SamEncoder) else self.encoder.config.class_tokens

    @property
    def width(self) -> int:
        """Returns E, the width of the tokens."""
        encoder = self.encoder
        return encoder.config.out_channels if isinstance(encoder, SamEncoder) else encoder.config.width

    @property
    def shape(self) -> tuple[int, int]:
        """Returns (T + h * w, E), the shape of all tokens of an image."""
        return self.class_tokens + self.grid[0] * self.grid[1], self.width

    @torch.no_grad()
    def __call__(self, images: Tensor, samples: Tensor | None = None, inside: Tensor | None = None) -> Tokens:
        """Returns the tokens of images.

        images   [B, C, H, W]  integers, as they are stored; resized to the teacher's size
        samples  [B]           numbers of training images, for the cache; None: computed in any case
        inside   [B, 2]        height and width of photographs in a square frame; None: images without padding
        """
        if self.cache is None or samples is None:
            return self.teach(images, inside)
        numbers = samples.tolist()
        kept = [self.cache.read(number) for number in numbers]
        if any(tokens is None for tokens in kept):
            # All of the batch: its size may decide the last bits, which shall be those of a run without a cache.
            class_tokens, patches = self.teach(images, inside)
            computed = torch.cat([class_tokens, patches.flatten(1, 2)], dim=1)
            for row, number in enumerate(numbers):
                if kept[row] is None:
                    kept[row] = self.cache.keep(number, computed[row])
        tokens = torch.stack([tokens for tokens in kept if tokens is not None]).to(images.device)
        patches = rearrange(tokens[:, self.class_tokens :], "b (h w) e -> b h w e", h=self.grid[0])
        return Tokens(tokens[:, : self.class_tokens], patches)

    def teach(self, images: Tensor, inside: Tensor | None = None) -> Tokens:
        """Computes the tokens of images, as in `__call__`."""
        if self.device != images.device:
            self.device = images.device
            self.encoder.to(self.device)
            self.pixels.to(self.device)
        pixels = self.pixels.normalise(images)
        if inside is not None:
            pixels = blank_padding(pixels, inside)
        if pixels.shape[-2:] != self.image_size:
            pixels = F.interpolate(pixels, self.image_size, mode="bicubic", align_corners=False, antialias=True)
        class_tokens, patches = encode(self.encoder, pixels)
        return Tokens(class_tokens.bfloat16(), patches.bfloat16())


def open_teacher(path: Path, image_size: tuple[int, int] | None, channels: int) -> Teacher:
    """Loads the encoder in a run, file or folder as a teacher; decoders and heads are left out.

    image_size  to which positions are resized; None: the teacher's own
    channels    of the images

    Raises CheckpointError if there is no encoder, ConfigError if it is for other channels or the size does not fit.
    """
    opened = open_weights(path)
    encoder = copy.deepcopy(_load(opened))  # what is loaded from an opened file stays in it, and somebody may write it
    config = encoder.config
    if config.in_channels != channels:
        raise ConfigError(
            f"task.teacher={path} is for images of {config.in_channels} channels, and data.mean and data.std have "
            f"{channels}: give them as many values, and set model.in_channels={config.in_channels}"
        )
    scale = scale_of(opened, channels)
    if not scale.known:
        say(f"task.teacher: {path} does not say its mean and deviation: {scale_words(scale.mean, scale.std)} is taken")
    teacher = Teacher(encoder, Pixels(scale.mean, scale.std), path)
    if image_size is not None and image_size != config.image_size:
        try:
            teacher.encoder = resize(encoder, image_size).eval().requires_grad_(False)
        except ConfigError as error:
            raise ConfigError(f"task.teacher_size={list(image_size)} is no size for {path}: {error}") from error
    return teacher


def _load(opened: Opened) -> Encoder | SamEncoder:
    if opened.kind == "sam":
        return load_sam(opened)
    if opened.kind == "segmentation":
        return load_segmenter(opened).encoder
    found = load(opened, **LEFT_OUT)
    # The norm of a classifier that pools patches comes after pooling: its tokens are those of the last block.
    return found if isinstance(found, Classifier) else at_image_size(found, found.config.image_size)


def resize(encoder: Encoder | SamEncoder, image_size: tuple[int, int]) -> Encoder | SamEncoder:
    """Returns the encoder for images of another size. Raises ConfigError if its patches do not fit."""
    if isinstance(encoder, SamEncoder | Classifier):
        return encoder.at(image_size)
    return at_image_size(encoder, image_size)


def fingerprint(encoder: Encoder | SamEncoder, pixels: Pixels) -> str:
    """Returns 16 digits of a SHA-256 of the weights, and of what tokens depend on beside them: heads, size, scale."""
    config, scale = encoder.config, [values.flatten().tolist() for values in (pixels.mean, pixels.std)]
    digest = hashlib.sha256(repr((config.image_size, config.patch_size, config.num_heads, scale)).encode())
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).numpy())
    return digest.hexdigest()[:16]
