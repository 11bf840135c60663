"""Order: (seed, epoch, position) → sample → the rows of a rank, as pure functions.

1 hashing   counter-based random numbers
2 order     a permutation of the samples per epoch, local in the shards
3 mixture   several data sets with fixed shares of each global batch
4 samplers  the micro-batches of a rank
"""
