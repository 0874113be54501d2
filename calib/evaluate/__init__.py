"""What pruning costs in answers: results side by side, and a bundle measured with the runtime alone. No torch."""
