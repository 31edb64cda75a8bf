"""A recipe that trains in a second, without a penalty, and a study of it."""

TINY = """
[data]
name = "synthetic"
train = 200
validation = 100
size = 8
pad = 1
[network]
kind = "resnet"
depth = 8
[train]
epochs = 1
batch = 50
"""

STUDY = """
title = "Tiny"
recipe = "base.toml"
seeds = [0, 1]

[arms]
none = {}
so = { extends = "so.toml" }

[evaluate]
images = 20
parts = ["accuracy", "noise", "orthogonality"]
"""
NOTHING = STUDY.replace('"accuracy", "noise", "orthogonality"', "")
"""The same, which evaluates nothing."""
TUNE = """
[tune]
seeds = [100, 101]
values = [0.1, 0.01]
"""
