"""Images to shuffled, indexed shards, once: python -m data.pack

1 source    folder, tars, or CSV list → samples, read only when their turn comes       sources.py
2 plan      a seeded permutation of all samples, cut into shards                       plan.py
3 write     each shard by itself: tar, index, read back, record                        writer.py
4 assemble  all shards checked, described in manifest.json, folder renamed             assemble.py
"""
