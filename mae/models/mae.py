"""Masked autoencoder: patchify, mask, encode, decode, loss as one pure function of images and noise."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mae.errors import ConfigError
from mae.models.config import MAEConfig
from mae.models.decoder import Decoder
from mae.models.drop_path import add_drop_path
from mae.models.loss import normalise_patches, patch_statistics, reconstruction_loss
from mae.models.masking import Masking, choose_predicted, draw_masking, given_masking
from mae.models.patches import interpolate_hidden, unpatchify
from mae.models.vit import Encoder

Statistics = Literal["original", "visible"]


class Output(NamedTuple):
    """Output of a masked forward pass. Hidden patches ascend: if Q = N-K, `pred.flatten(0, 1)` goes with `mask.bool()`.

    loss    []             float32, over the predicted patches
    pred    [B, Q, p*p*C]  predicted patches: all N-K hidden ones, or the part that a cross decoder predicts
    target  [B, Q, p*p*C]  normalised per patch under norm_pix
    mask    [B, N]         1 hidden, 0 visible
    ids     [B, Q]         numbers of the predicted patches, ascending
    """

    loss: Tensor
    pred: Tensor
    target: Tensor
    mask: Tensor
    ids: Tensor


class Reconstruction(NamedTuple):
    """Decoder output for all N patches: predictions, and images with the visible patches pasted in.

    pred    [B, N, p*p*C]  every patch, in the scale of the target
    images  [B, C, H, W]   in the input's scale; under norm_pix hidden patches get a mean and deviation that the model
                           does not predict: those of the true patches, or interpolated from the visible ones
    mask    [B, N]         1 hidden, 0 visible
    """

    pred: Tensor
    images: Tensor
    mask: Tensor


class MaskedAutoencoder(Encoder, Decoder):
    """Masked autoencoder (He et al. 2022): `model(images, noise)` is a pure function of its arguments.

    Encoder and decoder share one flat name space because the published checkpoints do.

    drop_path  stochastic depth of the encoder: rate of the last block, falling linearly to 0 at the first
    """

    def __init__(self, config: MAEConfig, drop_path: float = 0.0) -> None:
        nn.Module.__init__(self)
        self.config = config
        self._add_encoder(config)
        self._add_decoder(config)
        add_drop_path(self.blocks, drop_path)

    @property
    def whole_blocks(self) -> list[nn.Module]:
        """Blocks whose `forward` is called: all but the decoder's last, of which `last_tokens` computes a part."""
        return [*self.blocks, *self.decoder_blocks[:-1]]

    def forward(self, images: Tensor, noise: Tensor | None = None, mask: Tensor | None = None) -> Output:
        """Returns loss and predictions under the mask that `noise` draws, or under a given one.

        images  [B, C, H, W]  normalised
        noise   [B, N]        uniform
        mask    [B, N]        instead of noise: 1 hidden, 0 visible, as many hidden in every image; all are predicted

        In training, noise also draws the branches that stochastic depth leaves out; under a given mask there are none.

        Raises ConfigError if images, noise or mask are not what the model takes.
        """
        config = self.config
        patches = self.patchify(images)
        ids_keep, ids, mask = self._masking(patches, noise, mask)
        if noise is not None and config.predictions < ids.shape[1]:
            ids = choose_predicted(noise, ids, config.predictions)
        latent = self.encode_tokens(self.embed(_take(patches, ids_keep), ids_keep), noise)
        pred = self.decode(latent, ids_keep, ids)
        target = _take(patches, ids)
        if config.norm_pix:
            target = normalise_patches(target)
        return Output(reconstruction_loss(pred, target), pred, target, mask, ids)

    @torch.no_grad()
    def reconstruct(
        self,
        images: Tensor,
        noise: Tensor | None = None,
        mask: Tensor | None = None,
        statistics: Statistics = "original",
    ) -> Reconstruction:
        """Reconstructs whole images: all hidden patches are predicted. Arguments as in `forward`.

        statistics  patches whose mean and deviation hidden ones get under norm_pix: "original" or "visible"
        """
        config = self.config
        patches = self.patchify(images)
        ids_keep, ids_hidden, mask = self._masking(patches, noise, mask)
        latent = self.encode_tokens(self.embed(_take(patches, ids_keep), ids_keep))
        pred = self.decode_all(latent, ids_keep, ids_hidden)
        painted = self.in_pixels(pred, patches, mask if statistics == "visible" else None)
        pasted = torch.where(mask[..., None].bool(), painted, patches)
        return Reconstruction(pred, unpatchify(pasted, config.patch_size, config.grid), mask)

    def in_pixels(self, pred: Tensor, patches: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns predictions in the scale of the input, under norm_pix with mean and deviation of the true patches.

        pred, patches  [B, N, p*p*C]
        mask           [B, N]  if given, mean and deviation of hidden patches are interpolated from the visible ones
        """
        if not self.config.norm_pix:
            return pred.to(patches.dtype)
        mean, deviation = patch_statistics(patches)
        if mask is not None:
            mean, deviation = (interpolate_hidden(one, mask, self.config.grid) for one in (mean, deviation))
        return (pred.float() * deviation + mean).to(patches.dtype)

    def _masking(self, patches: Tensor, noise: Tensor | None, mask: Tensor | None) -> Masking:
        if mask is None and noise is not None:
            if noise.shape != patches.shape[:2]:
                raise ConfigError(
                    f"noise has the shape {tuple(noise.shape)}: {len(patches)} images of {patches.shape[1]} patches "
                    f"need {tuple(patches.shape[:2])}"
                )
            return draw_masking(noise, self.config)
        if mask is not None and noise is None:
            return given_masking(mask, patches.shape[0], patches.shape[1])
        raise ConfigError(f"pass exactly one of noise and mask; got {'neither' if noise is None else 'both'}")


def _take(patches: Tensor, ids: Tensor) -> Tensor:
    """Selects patches by number: [B, N, P], [B, n] -> [B, n, P]."""
    return patches.gather(1, ids[..., None].expand(-1, -1, patches.shape[-1]))
