"""Weights in the formats of other libraries, one file each, and the loaders that read any of them."""
