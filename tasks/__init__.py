"""What train.py and eval.py do, where `data/` and `mae/` meet: a file for each kind of training."""
