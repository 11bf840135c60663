"""SAM-style segmentation (Kirillov et al. 2023), in the order of a training step.

1 frame    photograph in a square, normalised, zeros beside it           data/loader, square_frame
2 encode   windowed ViT → image embedding [B, 256, 64, 64]               encoder, attention, kernels; convert an MAE
3 prompt   simulated points, boxes and corrections                       prompts
4 answer   prompt encoder, mask decoder → masks and predicted IoUs       segmenter; relevance gates the embedding
5 loss     focal + dice of the best mask, error of the predicted IoU     loss

`session` repeats 3 to 5 for each object, `segmentation` is the Lightning module, `scores` measures what was learned.
"""
