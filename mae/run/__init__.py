"""The run folder runs/NAME: its checkpoints, metrics.csv, and the runs of W&B and MLflow that belong to it."""
