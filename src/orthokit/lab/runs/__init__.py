"""A recipe and a seed in a folder: its files, its result, and how many of them share a machine."""
