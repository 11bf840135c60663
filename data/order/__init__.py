"""Order: (seed, epoch, position) → sample → the rows of a rank, as pure functions.

1 hashing   counter-based random numbers
2 choice    which samples an epoch shows, where data.sampling says with which probabilities
3 order     a permutation of them per epoch, local in the shards
4 mixture   several data sets with fixed shares of each global batch
5 samplers  the micro-batches of a rank
"""
