"""Images: CIFAR as published, sets that need no download, your own; and how they are shuffled and augmented."""
