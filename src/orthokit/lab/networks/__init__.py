"""Residual and wide residual networks for small images, and anybody's own by name."""
