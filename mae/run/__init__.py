"""The run folder runs/NAME and what outlives a process.

folder             the folder, the checkpoint to resume from, what overwrite=true deletes, environment.json, ended.json
lease              one start at a time writes there
checkpoint_files   names of checkpoints, which one can be trusted, reading, comparing their settings
checkpoint_writer  writing them whole, or not at all
metrics            metrics.csv, continued on a resume
tracker_identity   one run of W&B or MLflow through all restarts
artifacts          checkpoints and exports as artifacts of that W&B run
"""
