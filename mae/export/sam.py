"""Keeps old imports of `to_sam` from here working."""

from mae.sam.convert import to_sam

__all__ = ["to_sam"]
