"""The masked autoencoder: encoder, decoder and objective as one pure function of images and noise."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mae.loss import normalise_patches, patch_statistics, reconstruction_loss
from mae.models.config import MAEConfig
from mae.models.decoder import Decoder
from mae.models.masking import random_masking
from mae.models.patches import patchify, unpatchify
from mae.models.vit import Encoder


class Output(NamedTuple):
    """One masked forward pass; hidden patches in ascending order, so `pred.flatten(0, 1)` goes with `mask.bool()`.

    loss    []               float32
    pred    [B, N-K, p*p*C]
    target  [B, N-K, p*p*C]  normalised per patch when the model says norm_pix
    mask    [B, N]           1 hidden, 0 visible
    """

    loss: Tensor
    pred: Tensor
    target: Tensor
    mask: Tensor


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

    def forward(self, images: Tensor, noise: Tensor) -> Output:
        """Loss and predictions under the mask that `noise` ranks.

        images  [B, C, H, W]  normalised
        noise   [B, N]        uniform
        """
        config = self.config
        patches = patchify(images, config.patch_size)
        ids_keep, ids_hidden, mask = random_masking(noise, config.visible)
        latent = self.encode_tokens(self.embed(_take(patches, ids_keep), ids_keep))
        pred = self.decode(latent, ids_keep, ids_hidden, hidden_only=True)
        target = _take(patches, ids_hidden)
        if config.norm_pix:
            target = normalise_patches(target)
        return Output(reconstruction_loss(pred, target), pred, target, mask)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, noise: Tensor) -> Reconstruction:
        """The picture that the decoder paints; arguments as in `forward`."""
        config = self.config
        patches = patchify(images, config.patch_size)
        ids_keep, ids_hidden, mask = random_masking(noise, config.visible)
        latent = self.encode_tokens(self.embed(_take(patches, ids_keep), ids_keep))
        decoded = self.decode(latent, ids_keep, ids_hidden)[:, -config.patches :]
        order = torch.cat([ids_keep, ids_hidden], dim=1)
        pred = torch.empty_like(decoded).scatter_(1, order[..., None].expand_as(decoded), decoded)
        painted = pred.to(patches.dtype)
        if config.norm_pix:
            mean, deviation = patch_statistics(patches)
            painted = (pred.float() * deviation + mean).to(patches.dtype)
        pasted = torch.where(mask[..., None].bool(), painted, patches)
        return Reconstruction(pred, unpatchify(pasted, config.patch_size, config.grid), mask)


def _take(patches: Tensor, ids: Tensor) -> Tensor:
    """The patches with the given numbers: [B, N, P], [B, n] -> [B, n, P]."""
    return patches.gather(1, ids[..., None].expand(-1, -1, patches.shape[-1]))
