"""Training, in the order in which a run needs it.

1 schedule            recipe and machine → accumulation, steps, learning rate
2 precision           precision=auto → bf16-mixed or 32-true
3 strategies          one device, DDP or FSDP, with the same checkpoint files
4 training            what all tasks share: optimiser, seeds per micro-batch, contents of a checkpoint
  pretraining         images, noise → loss
  finetuning          images, labels → loss
5 optim               AdamW, layer-wise learning-rate decay
6 validation          means over all samples of all ranks
7 lightning_progress  resume: Lightning's counters from the step
"""
