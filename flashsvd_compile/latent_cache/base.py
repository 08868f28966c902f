"""What transformers gives to build on. Only this module of the package imports it when loaded.

A class of ours that is one of transformers' must have it at hand, so ``LatentCache`` is left out
of ``__all__`` and loaded by name only: the package itself still needs no transformers.
"""

from importlib import import_module
from typing import Any

try:
    # Any: its versions annotate these classes differently.
    _caches: Any = import_module("transformers.cache_utils")
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError(
        'LatentCache needs transformers: pip install "flashsvd_compile[checkpoints]"'
    ) from error

Cache: Any = _caches.Cache
DynamicCache: Any = _caches.DynamicCache
DynamicLayer: Any = _caches.DynamicLayer
DynamicSlidingWindowLayer: Any = _caches.DynamicSlidingWindowLayer
