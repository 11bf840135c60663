"""Shards and streams: from bytes in tars to uint8 batches. Knows nothing of `mae`."""
