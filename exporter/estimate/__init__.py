"""What a model would cost on a target, from its configuration alone."""
