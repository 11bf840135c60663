"""Index: which tars a path means, and where each sample lies in them. Command: python -m data.index

1 splits      paths, globs, URLs → the tars of one split
2 tar         a tar → its members, from the headers alone
3 index_file  those → X.idx and X.idx.bin beside it, once
4 index       all samples of a list of tars as numbers 0 … n - 1
"""
