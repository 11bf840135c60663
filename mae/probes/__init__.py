"""Probes: what is measured on the features of a frozen encoder.

1 open     trained model, untrained twin, images of the run               models_under_probe
2 select   the probes that fit checkpoint and data                        suite
3 extract  one pass over the images for all features that are missing     models_under_probe, features, feature_cache
4 measure  numbers and pictures, one file for each probe                  knn, linear, attentive, reconstruct, …
5 draw     accuracies and losses of a whole suite                         score_figures
"""
