"""What a user's own pictures decide about a checkpoint: the selector's settings, and how many tokens to keep."""
