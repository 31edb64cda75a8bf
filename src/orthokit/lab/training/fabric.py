"""Lightning Fabric, without a library that Fabric imports only to read its version."""

import sys

_LEFT_OUT = "torchmetrics"
"""Fabric imports it to compare its version, with SciPy and Transformers behind it: half of the time in which a run starts."""

_present = _LEFT_OUT in sys.modules
if not _present:
    sys.modules[_LEFT_OUT] = None  # type: ignore[assignment]  # importing it fails, as if it were not installed
try:
    from lightning_fabric import Fabric, __version__, seed_everything
finally:
    if not _present:
        del sys.modules[_LEFT_OUT]

__all__ = ["Fabric", "__version__", "seed_everything"]
