"""How many shapes of products PyTorch remembers on a CPU.

A CPU that multiplies bf16 quickly does so by oneDNN, which compiles a product for each shape that
it meets. oneDNN keeps the last 1024, and ideep, by which PyTorch calls it, 1024 descriptions of
them: some 0.3 MB each. Training and serving meet new lengths all the time, and would come to hold
600 MB of them, and some 200 MB of gaps, since they lie among the tensors: a third of what training
a model of 135M parameters takes. One pass has some tens of shapes; a new one takes half a
millisecond, once for all layers.
"""

import os

MOST = 128
"""More than a pass has; with fewer, each layer would make them anew."""
_AN_ADAPTER = 32
"""More than each adapter of a group adds to a pass, by the products with its own tokens."""
_PYTORCHS_OWN = 1024
_NAMES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Of oneDNN, and of ideep."""


def bound_shapes(adapters: int = 0) -> None:
    """Remember at most `MOST`, and more where so many adapters are trained in one pass; unless the
    environment says how many.

    A process reads it at its first products in bf16, and never again.
    """
    most = min(MOST + _AN_ADAPTER * adapters, _PYTORCHS_OWN)
    for name in _NAMES:
        os.environ.setdefault(name, str(most))
