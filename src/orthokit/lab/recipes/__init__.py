"""Recipes in TOML: which network is trained on which images, and how."""
