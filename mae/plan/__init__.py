"""Forecast of a run that is not started (plan=true): memory per device, images per second, time, price, disk.

1 devices.py        the device: published peak FLOP/s and memory of GPUs, or a measured peak
2 training_cost.py  settings of the model -> parameters and FLOPs per image by formula; workload: model and loss
3 dry_step.py       one training step of the workload on tensors without storage -> bytes and FLOPs as torch counts them
4 forecast.py       both, and the number of devices -> memory and speed under each strategy, time, price, disk
5 tables.py         the forecast on the screen
"""
