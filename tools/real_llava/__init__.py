"""A second, larger real model, put together from published packages: python -m tools.real_llava --help."""
