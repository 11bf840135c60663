"""Bytes of an image: header, crop, decoding of that region, augmentation; masks."""
