"""How a task is assembled from `data/` and `mae/`, a file for each kind of training; `mae/train` is how it learns."""
