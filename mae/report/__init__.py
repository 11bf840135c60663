"""The report of a run as one page that needs no server and no network: python -m mae.report runs/NAME"""
