"""Distillation of a frozen teacher into a smaller student (Hinton et al. 2015), in the order of a training step.

1 teach     images → the teacher's tokens, bfloat16; computed, or read from disk    teacher, mae/sam/embedding_cache
2 match     the teacher's grid of tokens → the student's, by interpolation          loss
3 imitate   visible patches → the student's tokens → a head → the teacher's tokens  student
4 compare   1 - cosine; for a SAM-style student mean square of the embedding        loss

`distillation` is the Lightning module, `warm_start` what init_from= does, `floors` what trivial predictors reach.
"""
