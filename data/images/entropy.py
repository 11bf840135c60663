"""Colour entropy of an image: how many bits the colour of one of its pixels holds."""

import numpy as np

BITS = 3  # of each channel: 8 x 8 x 8 colours of an RGB image


def colour_entropy(pixels: np.ndarray) -> float:
    """Computes the entropy, in bits, of the joint histogram of all channels with 8 equal intervals each.

    pixels   [C, H, W]  uint8 or uint16
    returns  from 0, one colour, to at most 3·C (RGB: 9), each colour as often; a photograph has 4 to 7, a logo 1
    """
    levels = pixels.reshape(len(pixels), -1) >> (8 * pixels.itemsize - BITS)
    if len(levels) <= 4:
        code = np.zeros(levels.shape[1], np.int64)
        for channel in levels:
            code = (code << BITS) | channel
        counts = np.bincount(code)
    else:  # a histogram of so many channels is mostly empty
        _, counts = np.unique(levels, axis=1, return_counts=True)
    shares = counts[counts > 0] / levels.shape[1]
    return float(-(shares * np.log2(shares)).sum())
