"""`LatentCache`: a cache of transformers that keeps keys and values in rank space."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flashsvd_compile.latent_cache.base import Cache
from flashsvd_compile.latent_cache.hooks import hooks_of
from flashsvd_compile.latent_cache.layers import LatentLayer, SlidingLatentLayer
from flashsvd_compile.latent_cache.reading import Reading, read


class LatentCache(Cache):
    """Keys and values of a decoder with factored key and value projections, as latents.

        cache = fsc.LatentCache(model)
        model.generate(**inputs, past_key_values=cache)

    It grows as ``DynamicCache`` does and takes its place: beam search, cropping, selecting and
    repeating rows, ``copy.deepcopy`` of a prompt's cache, sliding windows. Each step lifts the
    latents of all tokens again and rotates keys anew, as the attention module would have done, so
    it trades arithmetic for memory. Compiled, values need no lift: see ``backend="flashsvd"``.

    Kept for one token of one layer, in numbers:

    ================  =====================================  ====================
    factors           latents                                dense cache
    ================  =====================================  ====================
    whole matrix      r_k + r_v                              2·num_kv_heads·D
    head by head      num_kv_heads·(r_k + r_v)               2·num_kv_heads·D
    ================  =====================================  ====================

    so the share of a dense cache is (r_k + r_v) / (2·num_kv_heads·D), or (r_k + r_v) / (2·D) with
    ranks of a head. Positions come to that where keys are rotated: 8 bytes a token for all layers
    together (for each kind of them, where some slide or rotate otherwise), once for all rows
    while these are alike. A sliding window of W keeps W − 1 tokens.

    Iterating gives (latents of keys [B, T, r_k], of values [B, T, r_v], None) of each layer.

    The idea of caching latents, and keys before RoPE, is Palu's (https://arxiv.org/abs/2407.21118).
    """

    layers: list[LatentLayer]

    def __init__(self, model: nn.Module) -> None:
        """Run ``model`` once on a few tokens to see how its keys and values are made.

        Args:
            model: a decoder of transformers, or what ``torch.compile`` made of one. Its weights
                must be there, on their devices.

        Raises:
            TypeError: ``model`` is no model of transformers.
            ValueError: keys or values of some layer cannot be made again from latents; says which
                module, and why: a dense or fused projection, cross-attention, RoPE whose
                frequencies depend on the length (``dynamic``, ``longrope``), or another way that
                is not understood.
        """
        model = getattr(model, "_orig_mod", model)
        readings = read(model)
        layers: list[LatentLayer] = []
        owners: list[tuple[Reading, LatentLayer]] = []
        for reading in readings:
            layer = _layer(reading)
            if reading.rotation is not None:
                alike = [other for other in owners if reading.keeps_with(other[0])]
                if alike:
                    alike[-1][1].is_last = layer.is_first = False
                    layer.rotation = alike[-1][1].rotation
                else:
                    layer.rotation = reading.rotation
                owners.append((reading, layer))
            layers.append(layer)
        super().__init__(layers=layers)
        for layer in layers:
            layer.reset()
        self._hooks = hooks_of(model, [reading.attention for reading in readings])
        # By which a hook knows the caches of its own model.
        self.model_name = self._hooks.model_name
        self._dense_features = sum(reading.dense_features for reading in readings)

    @property
    def bytes_per_token(self) -> int:
        """Bytes kept for one token of one row, over all layers, positions included.

        Of layers with a sliding window: for a token within it.
        """
        latents = sum(sum(layer.widths) * layer.dtype.itemsize for layer in self.layers)
        turning = [x for x in self.layers if x.rotation is not None and x.is_first]
        return latents + torch.long.itemsize * len(turning)

    @property
    def dense_bytes_per_token(self) -> int:
        """What ``DynamicCache`` keeps in its place: 2·num_kv_heads·D numbers for each layer."""
        return self._dense_features * self.layers[0].dtype.itemsize

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, None]]:
        for layer in self.layers:
            yield layer.keys.squeeze(1), layer.values.squeeze(1), None


def _layer(reading: Reading) -> LatentLayer:
    key: Any = getattr(reading.attention, reading.route.key)
    value: Any = getattr(reading.attention, reading.route.value)
    widths = (key.latent_features, value.latent_features)
    like = next(key.parameters())
    if reading.sliding_window is None:
        return LatentLayer(reading.route, widths, like)
    return SlidingLatentLayer(reading.route, widths, like, sliding_window=reading.sliding_window)
