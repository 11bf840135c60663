"""Samples to batches: data sets, workers, shared memory, prefetching, faults."""
