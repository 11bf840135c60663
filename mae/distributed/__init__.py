"""The ranks of one run.

launch     who this process is among them (torchrun, SLURM), or a relaunch under torchrun
launchers  the same for ranks of MPI and Kubernetes; who else is refused
ranks      a process group for small objects, outside of a training loop
rank_zero  printing and warning once
slurm      the tasks that srun has started
requeue    who has ended a SLURM job, and whether it has to be requeued
processes  is the process that wrote a file alive, is the launcher
restarts   is this process a restart by torchrun, SLURM or Kubernetes
"""
