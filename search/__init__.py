"""What sweep.py does: Optuna proposes settings, ordinary runs of train.py give their values."""
