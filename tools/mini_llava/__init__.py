"""How `mini-llava`, the checkpoint that ships with the project, is made: python -m tools.mini_llava --help."""
