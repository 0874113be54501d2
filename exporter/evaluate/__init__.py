"""Selectors side by side on a checkpoint: every contender sees the same encoded pictures and questions."""
