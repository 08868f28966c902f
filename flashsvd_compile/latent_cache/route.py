"""The way from an attention's input to the keys and values that it hands to a cache.

    x → key.latents_of → kept → key.lifted → norms → heads → rotation → K [B, H, T, D]
    x → value.latents_of → kept → value.lifted → heads → V [B, H, T, D]

`Route` says which modules those are, by their names in the attention module: it holds no module,
so whoever keeps one keeps no model alive and copies none. ``reading.py`` finds it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

# What a norm reads: the flat features [B, T, H·D], heads behind tokens [B, T, H, D] or before.
Where = Literal["flat", "tokens", "heads"]
Turned = tuple[Tensor, Tensor]  # cosines and sines, [B or 1, T, rotated features] each


@dataclass(frozen=True)
class Norm:
    name: str
    where: Where


@dataclass(frozen=True)
class Route:
    """Of one attention module.

    ``key``, ``value``: its factored projections; ``norms``: what reads keys before they turn;
    ``rotate``: (q, k, cos, sin) → both, turned, or None; ``rotated``: how many leading features of
    a head turn, or None where ``rotate`` is given all; ``x``, ``position_ids``: how the module is
    given its input and the positions, by the name of an argument, or by place (``x`` only).
    """

    key: str
    value: str
    head_dim: int
    norms: tuple[Norm, ...] = ()
    rotate: Callable[..., Any] | None = None
    rotated: int | None = None
    x: str | int = "hidden_states"
    position_ids: str = "position_ids"

    def latents(self, attention: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, in] → latents of keys [B, T, r_k] and of values [B, T, r_v]."""
        key: Any = getattr(attention, self.key)
        value: Any = getattr(attention, self.value)
        return key.latents_of(x), value.latents_of(x)

    def keys(self, attention: nn.Module, latents: Tensor, turned: Turned | None) -> Tensor:
        """[B, T, r_k] → [B, H, T, D]."""
        key: Any = getattr(attention, self.key)
        y = self._normed(attention, key.lifted(latents), "flat")
        y = self._normed(attention, self._heads(y), "tokens").transpose(1, 2)
        y = self._normed(attention, y, "heads")
        return y if turned is None else self._turned(y, *turned)

    def values(self, attention: nn.Module, latents: Tensor) -> Tensor:
        """[B, T, r_v] → [B, H, T, D]."""
        value: Any = getattr(attention, self.value)
        return self._heads(value.lifted(latents)).transpose(1, 2)

    def _heads(self, y: Tensor) -> Tensor:
        return y.view(*y.shape[:-1], -1, self.head_dim)

    def _normed(self, attention: nn.Module, y: Tensor, where: Where) -> Tensor:
        for norm in self.norms:
            if norm.where == where:
                y = getattr(attention, norm.name)(y)
        return y

    def _turned(self, y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        assert self.rotate is not None
        # Such functions turn queries, too: one head of the keys stands for them, and is dropped.
        if self.rotated is None:
            return self.rotate(y[:, :1], y, cos, sin)[1]
        turning, still = y[..., : self.rotated], y[..., self.rotated :]
        return torch.cat((self.rotate(turning[:, :1], turning, cos, sin)[1], still), dim=-1)
