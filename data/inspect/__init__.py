"""Statistics of shards: python -m data.inspect

1 sample   every sample with --deep, else evenly spread ones                          inspect.py
2 examine  header, hash, and with --deep or for some pixels, in several processes     survey.py
3 sum      counts, histograms, mean and deviation, duplicates                         survey.py
4 compare  with --duplicates the looks of all samples                                 duplicates.py
5 report   a table, JSON, a contact sheet                                             __main__.py, contact_sheet.py
"""
