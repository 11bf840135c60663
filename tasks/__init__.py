"""What train.py can train: each task puts `data/` and `mae/` together."""
