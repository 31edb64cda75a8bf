"""What is measured of a trained network: calibration, robustness, features."""
