"""The method (He et al. 2022, section 3): `MaskedAutoencoder.forward` in mae.py, step by step.

1 patchify  images [B, C, H, W] → patches [B, N, p*p*C]                      patches.py
2 mask      noise ranks the patches; the lowest K stay visible               noise.py, masking.py
3 encode    visible patches → tokens with positions → latent [B, 1+K, D]     vit.py
4 decode    latent and mask tokens → predictions of the hidden patches       decoder.py
5 loss      mean squared error on the hidden patches, normalised per patch   loss.py

Beside them: config.py (architecture and objective), pixels.py (integers → normalised images), resample.py (other image
and patch sizes), classifier.py, attention_maps.py, execution.py (activation checkpointing, compilation), flops.py.
"""
