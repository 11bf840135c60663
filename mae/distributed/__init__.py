"""The ranks of one run.

launch     who this process is among them (torchrun, SLURM), or a relaunch under torchrun
ranks      a process group for small objects, outside of a training loop
rank_zero  printing and warning once
slurm      requeueing
"""
