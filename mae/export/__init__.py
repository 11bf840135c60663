"""Export of a model to the format of another library: `python -m mae.export`.

1 open       the run or file, once, and load what the format holds, at the size that is wanted     open.py
2 write      file or folder, into a temporary folder beside --out                                  mae/formats
3 read back  with `mae.load` or `mae.load_sam`, bit for bit                                        write.py
4 verify     run the other library and the model on a photograph                                   verify.py
5 card       origin, architecture, verification, checksums; then all is moved to --out             write.py
"""
