"""A recipe that trains in a second, without a penalty."""

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
