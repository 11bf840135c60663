"""What a run says of itself. train.py: the table at the start, at the end summary.json, loss curve and closing lines.

python -m mae.report runs/NAME writes one HTML page that needs no server and no network:

1 runs.py          run folders -> Run: settings, metrics, pictures, bad samples; without the data
2 charts.py        metrics -> lines, ticks and marks in percent of a chart (axes.py: round ticks, thinned lines)
3 run_pictures.py  reconstructions cut out of their grids; attention maps of the newest checkpoint
4 page.py          key numbers, recipe, environment; page.html and parts.html put everything together
"""
