"""Images: bytes → header (decode, jpeg, arrays, pil) → crops → decode → augment; masks beside them."""
