"""Ranks of one run: detecting or launching them, process groups of small objects, SLURM."""
