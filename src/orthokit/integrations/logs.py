"""What the adapters log."""

from orthokit.regularizer import Regularizer


def measured(ortho: Regularizer, strength: float, prefix: str) -> dict[str, float]:
    """``prefix/`` with each layer's penalty, ``total`` (``strength`` times their sum) and ``strength``.

    >>> layer = nn.Conv2d(2, 2, 1)
    >>> _ = nn.init.dirac_(layer.weight).data.mul_(2)  # Gram matrix diag(4, 4)
    >>> measured(orthokit.Regularizer(layer, orthokit.SO(), strength=0.5), 0.1, "ortho")
    {'ortho/Conv2d': 18.0, 'ortho/total': 1.8, 'ortho/strength': 0.1}
    """
    layers = ortho.per_layer()
    values = {f"{prefix}/{layer}": value for layer, value in layers.items()}
    return {**values, f"{prefix}/total": strength * sum(layers.values()), f"{prefix}/strength": strength}
