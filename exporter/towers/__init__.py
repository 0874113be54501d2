"""Vision towers that families share: built from a config, with transformers' parameter names."""
