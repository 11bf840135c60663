"""Old place of `mae.to_sam`; imports from here go on working."""

from mae.sam.convert import to_sam

__all__ = ["to_sam"]
