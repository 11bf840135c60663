"""What sweep.py does: trials of a study, one ordinary run of train.py each."""
