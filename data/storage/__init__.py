"""Where bytes lie: local files, URLs, the cache of copies, reading by position."""
