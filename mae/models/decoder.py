"""The decoder: a light transformer from visible latents and mask tokens to pixels. Used in pre-training only."""

import torch
from torch import Tensor, nn

from mae.models.config import MAEConfig
from mae.models.vit import LayerNorm, initialise, last_tokens, position_parameter, transformer_blocks


class Decoder(nn.Module):
    """MAE decoder with the parameter names of the published checkpoints (decoder_embed, mask_token, decoder_blocks).

    Source: He et al. 2022, section 3.
    """

    def _add_decoder(self, config: MAEConfig) -> None:
        width = config.decoder_width
        self.decoder_embed = nn.Linear(config.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_pos_embed = position_parameter(config, width)
        self.decoder_blocks = transformer_blocks(config.decoder_depth, width, config.decoder_num_heads)
        self.decoder_norm = LayerNorm(width)
        self.decoder_pred = nn.Linear(width, config.patch_values)
        initialise(self.decoder_embed, self.decoder_blocks, self.decoder_pred)
        nn.init.normal_(self.mask_token, std=0.02)

    def decode(self, latent: Tensor, ids_keep: Tensor, ids_hidden: Tensor, *, hidden_only: bool = False) -> Tensor:
        """What the decoder says of the tokens, in the order (class token, visible patches, hidden patches).

        latent       [B, 1+K, D]
        ids_keep     [B, K]
        ids_hidden   [B, N-K]
        hidden_only  return, and in the last block compute, what concerns the hidden patches only
        returns      [B, 1+N, p*p*C]; [B, N-K, p*p*C] for the hidden patches only

        The published decoder moves the tokens back into grid order first. Attention is blind to order and every token
        carries its position, so they stay where they are: the same function without the moves.
        """
        first = latent.shape[1] - ids_keep.shape[1]
        class_position, positions = self.decoder_pos_embed[:, :first], self.decoder_pos_embed[0, first:]
        visible = self.decoder_embed(latent)
        visible = torch.cat([visible[:, :first] + class_position, visible[:, first:] + positions[ids_keep]], dim=1)
        tokens = torch.cat([visible, (self.mask_token + positions[ids_hidden]).to(visible.dtype)], dim=1)
        for block in self.decoder_blocks[:-1]:
            tokens = block(tokens)
        last = self.decoder_blocks[-1]
        tokens = last_tokens(last, tokens, ids_hidden.shape[1]) if hidden_only else last(tokens)
        return self.decoder_pred(self.decoder_norm(tokens))
