"""What each stage of an answer costs, measured."""
