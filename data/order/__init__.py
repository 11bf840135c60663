"""(seed, epoch, position) to sample, and the rows of each rank: pure functions."""
