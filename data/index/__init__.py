"""Index: which tars a path means, and where each sample lies in them. Command: python -m data.index

1 splits      paths, globs, URLs → the tars of one split
2 tar         a tar → its members, from the headers alone
3 samples     members → samples: their images and labels
4 build       samples → X.idx and X.idx.bin beside the tar (index_file), once
5 index       all samples of a list of tars as numbers 0 … n - 1
6 classes     their labels as names
"""
