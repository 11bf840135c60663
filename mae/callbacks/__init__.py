"""What happens beside the training step: measuring, showing, saving, stopping."""
