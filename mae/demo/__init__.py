"""A page on this machine that shows what a model makes of a photograph: python -m mae.demo runs/NAME

1 photo.py        file -> upright photograph -> uint8 [1, C, H, W] of the model's shape
2 model.py        reconstruction under a mask, attention of a patch, pooled feature
3 gallery.py      feature -> nearest training images, among those that probe=neighbours has kept
4 views.py        all of that as pictures and sentences (html_images.py)
5 page.py         Gradio components and the events that connect them; patches.js picks or paints patches
6 serve.py        the page behind a socket; nothing leaves the machine
"""
