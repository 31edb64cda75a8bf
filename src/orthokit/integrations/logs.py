"""What the adapters log."""

from orthokit.regularizer import Regularizer


def measured(ortho: Regularizer, prefix: str) -> dict[str, float]:
    """``prefix/`` with each layer's penalty, ``total`` (what a call of ``ortho`` adds to the loss) and ``strength``.

    >>> layer = nn.Conv2d(2, 2, 1)
    >>> _ = nn.init.dirac_(layer.weight).data.mul_(2)  # Gram matrix diag(4, 4)
    >>> measured(orthokit.Regularizer(layer, orthokit.SO(), strength=0.5), "ortho")
    {'ortho/Conv2d': 18.0, 'ortho/total': 9.0, 'ortho/strength': 0.5}
    """
    layers, strength = ortho.per_layer(), ortho.strength
    values = {f"{prefix}/{layer}": value for layer, value in layers.items()}
    return {**values, f"{prefix}/total": strength * sum(layers.values()), f"{prefix}/strength": strength}
