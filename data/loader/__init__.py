"""Samples to batches, in the order in which a micro-batch passes.

1 MicroBatches        the samples of this rank's next micro-batch               data/order/samplers.py
2 PrefetchingSampler  downloads the shards of this window and of the next one    prefetch.py
3 SlotSampler         lends the micro-batch a slot of the ring                   loader.py, shared_batches.py
4 ShardDataset        reads, crops and decodes into the slot, in a worker        *dataset.py
5 ShardLoader         counts bad samples, hands out the slot as a batch          loader.py, faults.py

data.mode=stream goes through webdataset instead: streaming.py
"""
