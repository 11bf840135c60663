"""The masked autoencoder: encoder, decoder and objective as one pure function of images and noise."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mae.errors import ConfigError
from mae.models.config import MAEConfig
from mae.models.decoder import Decoder
from mae.models.loss import normalise_patches, patch_statistics, reconstruction_loss
from mae.models.masking import Masking, draw_masking, given_masking, some_hidden
from mae.models.patches import patchify, unpatchify
from mae.models.vit import Encoder


class Output(NamedTuple):
    """One masked forward pass; hidden patches in ascending order, so `pred.flatten(0, 1)` goes with `mask.bool()`.

    Where a cross decoder predicts Q of the N-K hidden patches, pred and target hold those alone, and loss is theirs;
    mask still says what is hidden, ids which of it is predicted.

    loss    []             float32
    pred    [B, Q, p*p*C]  Q = N-K unless the model says that less is predicted
    target  [B, Q, p*p*C]  normalised per patch when the model says norm_pix
    mask    [B, N]         1 hidden, 0 visible
    ids     [B, Q]         patch that each prediction is of, ascending
    """

    loss: Tensor
    pred: Tensor
    target: Tensor
    mask: Tensor
    ids: Tensor


class Reconstruction(NamedTuple):
    """What the decoder says of whole images.

    pred    [B, N, p*p*C]  every patch, in the scale of the target
    images  [B, C, H, W]   in the input's scale, visible patches pasted in; under norm_pix the hidden ones carry the
                           mean and deviation of the true patches, which the model does not predict
    mask    [B, N]         1 hidden, 0 visible
    """

    pred: Tensor
    images: Tensor
    mask: Tensor


class MaskedAutoencoder(Encoder, Decoder):
    """Masked autoencoder (He et al. 2022): `model(images, noise)` is a pure function of its arguments.

    Encoder and decoder share one flat name space because the published checkpoints do.
    """

    def __init__(self, config: MAEConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self._add_encoder(config)
        self._add_decoder(config)

    @property
    def whole_blocks(self) -> list[nn.Module]:
        """The blocks that are computed as a whole: of the decoder's last one `last_tokens` computes a part."""
        return [*self.blocks, *self.decoder_blocks[:-1]]

    def forward(self, images: Tensor, noise: Tensor | None = None, mask: Tensor | None = None) -> Output:
        """Loss and predictions under the mask that `noise` stands for, or a given one, of which all is predicted.

        images  [B, C, H, W]  normalised
        noise   [B, N]        uniform
        mask    [B, N]        instead of noise: 1 hidden, 0 visible, as many hidden in every image

        Raises ConfigError for a mask that cannot be.
        """
        config = self.config
        patches = patchify(images, config.patch_size)
        ids_keep, ids, mask = self._masking(patches, noise, mask)
        if noise is not None and config.predictions < ids.shape[1]:
            ids = some_hidden(noise, ids, config.predictions)
        latent = self.encode_tokens(self.embed(_take(patches, ids_keep), ids_keep))
        pred = self.decode(latent, ids_keep, ids)
        target = _take(patches, ids)
        if config.norm_pix:
            target = normalise_patches(target)
        return Output(reconstruction_loss(pred, target), pred, target, mask, ids)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, noise: Tensor | None = None, mask: Tensor | None = None) -> Reconstruction:
        """The picture that the decoder paints, all hidden patches of it; arguments as in `forward`."""
        config = self.config
        patches = patchify(images, config.patch_size)
        ids_keep, ids_hidden, mask = self._masking(patches, noise, mask)
        latent = self.encode_tokens(self.embed(_take(patches, ids_keep), ids_keep))
        pred = self.decode_all(latent, ids_keep, ids_hidden)
        pasted = torch.where(mask[..., None].bool(), self.in_pixels(pred, patches), patches)
        return Reconstruction(pred, unpatchify(pasted, config.patch_size, config.grid), mask)

    def in_pixels(self, pred: Tensor, patches: Tensor) -> Tensor:
        """Predictions in the scale of the input: under norm_pix with the mean and deviation of the true patches.

        pred, patches  [B, N, p*p*C]
        """
        if not self.config.norm_pix:
            return pred.to(patches.dtype)
        mean, deviation = patch_statistics(patches)
        return (pred.float() * deviation + mean).to(patches.dtype)

    def _masking(self, patches: Tensor, noise: Tensor | None, mask: Tensor | None) -> Masking:
        if mask is None and noise is not None:
            return draw_masking(noise, self.config)
        if mask is not None and noise is None:
            return given_masking(mask, patches.shape[0], patches.shape[1])
        raise ConfigError("a model takes either noise or a mask beside the images, one of them")


def _take(patches: Tensor, ids: Tensor) -> Tensor:
    """The patches with the given numbers: [B, N, P], [B, n] -> [B, n, P]."""
    return patches.gather(1, ids[..., None].expand(-1, -1, patches.shape[-1]))
