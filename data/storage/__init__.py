"""Storage: local files and URLs, the cache of downloaded shards, reads by position."""
