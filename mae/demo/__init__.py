"""A page on this machine that shows what a model makes of a photograph: python -m mae.demo runs/NAME

1 photo.py        file -> upright photograph -> uint8 [1, C, H, W] of the model's shape
2 model.py        of an autoencoder: reconstruction under a mask, attention of a patch, pooled feature
  gallery.py      feature -> nearest training images, among those that probe=neighbours has kept
  views.py        all of that as pictures and sentences (html_images.py)
  page.py         Gradio components and the events that connect them; patches.js picks or paints patches
3 sam_model.py    of a SAM: the embedding of a photograph, once; masks for clicks and a box
  sam_page.py     its components and events; prompts.js marks points and boxes
4 serve.py        the page behind a socket; nothing leaves the machine
"""
