"""One run, from its first image to its summary."""
