"""Residual and wide residual networks for small images, and networks of your own by name."""
