"""Training: Lightning modules of pre-training and fine-tuning, optimisers, schedule, strategies."""
