"""What transformers gives to build on. Only this module of the package imports it when loaded.

A class of ours that is one of transformers' must have it at hand, so ``LatentCache`` is left out
of ``__all__`` and loaded by name only: the package itself still needs no transformers.
"""

try:
    from transformers.cache_utils import Cache as Cache
    from transformers.cache_utils import DynamicCache as DynamicCache
    from transformers.cache_utils import DynamicLayer as DynamicLayer
    from transformers.cache_utils import DynamicSlidingWindowLayer as DynamicSlidingWindowLayer
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError(
        'LatentCache needs transformers: pip install "flashsvd_compile[checkpoints]"'
    ) from error
