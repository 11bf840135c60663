"""Hyper-parameter search with Optuna (sweep.py): each trial is one ordinary run of train.py."""
