"""Runs against each other: who may be compared, by which metric, with which test."""
