"""Layers of the cache: latents grow as keys and values do in transformers' own layers.

Latents lie as [B, 1, T, r], one "head" of width r, so that all which transformers' layers do along
batch and tokens (append, crop, slide, reorder) is theirs and does the same here.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flashsvd_compile.latent_cache.base import DynamicLayer, DynamicSlidingWindowLayer
from flashsvd_compile.latent_cache.rotation import Rotation
from flashsvd_compile.latent_cache.route import Route


class Call(NamedTuple):
    """What the attention module was called with, from its start to its update of the cache."""

    attention: nn.Module
    x: Tensor
    positions: Tensor | None


class LatentLayer(DynamicLayer):
    """Latents of one attention: ``keys`` [B, 1, T, r_k] and ``values`` [B, 1, T, r_v].

    ``rotation`` is shared by layers that rotate alike: the first of them appends positions, the
    last of them lets go of cosines and sines.
    """

    def __init__(self, route: Route, widths: tuple[int, int], like: Tensor, **kwargs: Any) -> None:
        """``widths``: r_k and r_v; ``like``: a tensor of the dtype and device of latents."""
        super().__init__(**kwargs)
        self.route, self.widths = route, widths
        self.rotation: Rotation | None = None
        self.is_first = self.is_last = True
        self.call: Call | None = None
        self.device, self.dtype = like.device, like.dtype
        self.is_initialized = True
        self._empty()

    def _empty(self) -> None:
        # No tokens yet, rather than nothing: a compiler that sees a length change between two
        # calls makes one graph for all lengths, and here it sees that at the second call.
        self.keys, self.values = (
            torch.empty((1, 1, 0, width), dtype=self.dtype, device=self.device)
            for width in self.widths
        )
        if self.rotation is not None and self.is_first:
            self.rotation.empty(self.device)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep the latents of what the attention module has just read.

        ``key_states`` and ``value_states`` are what it made of them and are not used: compiled,
        they are dead code. Returns K and V of all tokens, [B, H, T, D] each.
        """
        if self.call is None:
            raise RuntimeError(
                "LatentCache was given to a model that it was not made for, or whose layers were "
                "replaced since: use LatentCache(model) of the model that runs"
            )
        (attention, x, positions), self.call = self.call, None
        key_latents, value_latents = (y.unsqueeze(1) for y in self.route.latents(attention, x))
        new = key_latents, value_latents
        # Both lengths are read, though they are one: a compiler notes those that it was asked for.
        is_prefill = self.keys.shape[-2] == self.values.shape[-2] == 0
        if is_prefill:
            self.keys, self.values = key_latents[..., :0, :], value_latents[..., :0, :]
        key_latents, value_latents = super().update(*new)
        if is_prefill:
            key_latents, value_latents = new  # the same, and a compiler sees that they are latents
        rotation = self.rotation
        if rotation is None:
            turned = None
        else:
            if self.is_first:
                assert positions is not None
                rotation.append(positions)
                rotation.turn(x, tokens=key_latents.shape[-2])
                # A sliding layer may show more to this step than it keeps for the next.
                rotation.keep_last(self.keys.shape[-2])
            assert rotation.turned is not None
            cos, sin = rotation.turned
            turned = cos.to(x.device), sin.to(x.device)
            if self.is_last:
                rotation.turned = None
        return (
            self.route.keys(attention, key_latents.squeeze(1), turned),
            self.route.values(attention, value_latents.squeeze(1)),
        )

    def reset(self) -> None:
        super().reset()
        self.is_initialized = True
        self._empty()

    def crop(self, tokens_to_remove: int) -> None:
        before = self.get_seq_length()
        super().crop(tokens_to_remove)
        if self.rotation is not None and self.is_first:
            self.rotation.drop_last(before - self.get_seq_length())
            self.rotation.keep_last(self.keys.shape[-2])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.rotation is not None and self.is_first:
            self.rotation.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.rotation is not None and self.is_first:
            self.rotation.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.rotation is not None and self.is_first:
            self.rotation.repeat_interleave(repeats)


class SlidingLatentLayer(LatentLayer, DynamicSlidingWindowLayer):
    """The same for attention that sees ``sliding_window`` tokens: one less is kept for the next."""
