"""Measurements of a trained network: calibration, robustness, features."""
