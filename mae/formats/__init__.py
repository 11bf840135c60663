"""Weights in the formats of other libraries, one file each, and reading any of them."""
