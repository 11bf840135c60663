"""Images to shuffled, indexed shards, once: python -m data.pack"""
