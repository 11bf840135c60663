"""All runs below a folder as one table, from their files alone: python -m mae.runs runs/. Loads no torch.

1 find.py          folders -> run folders; others are counted
2 signs_of_life.py leases -> which runs are under way
3 read.py          a run folder -> Run: how it stands, step, loss, best score, speed, age
4 metrics_tail.py  the newest values in the last rows of metrics.csv
5 best.py          the best values, from all rows of metrics.csv
6 table.py         runs -> a table for 80 columns or more, and sentences below it
"""
