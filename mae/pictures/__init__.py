"""Pictures that several rooms need.

draw.py  grids of reconstructions, tiles, captions; loaded by training
show.py  what pages show of them: grids read back, attention over an image, data: URLs
"""
