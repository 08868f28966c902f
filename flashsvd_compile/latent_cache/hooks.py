"""What tells a cache the input of an attention module: one hook each, while a cache lives.

The hook holds no state. It looks for a `LatentLayer` in the cache that the module was called with,
so other caches see nothing of it, any number of caches share it, and a graph that was compiled for
one of them is right for all.
"""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from flashsvd_compile.latent_cache.base import Cache
from flashsvd_compile.latent_cache.layers import Call, LatentLayer

_LIVING: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[Hooks]]" = weakref.WeakKeyDictionary()


class Hooks:
    """Hooks on attention modules, for as long as somebody holds this object."""

    def __init__(self, attentions: Iterable[nn.Module]) -> None:
        self.attentions = tuple(weakref.ref(attention) for attention in attentions)
        handles = [
            attention.register_forward_pre_hook(tell, with_kwargs=True)
            for reference in self.attentions
            if (attention := reference()) is not None
        ]
        # The handles hold no module either.
        weakref.finalize(self, _remove, handles)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Hooks":
        """A copied cache shares them."""
        return self

    def are_on(self, attentions: Iterable[nn.Module]) -> bool:
        return [reference() for reference in self.attentions] == list(attentions)


def hooks_of(model: nn.Module, attentions: Iterable[nn.Module]) -> Hooks:
    """Those that caches of this model already hold, or new ones."""
    attentions = list(attentions)
    reference = _LIVING.get(model)
    living = None if reference is None else reference()
    if living is None or not living.are_on(attentions):
        living = Hooks(attentions)
        _LIVING[model] = weakref.ref(living)
    return living


def tell(attention: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Leave the call's input with the layer that the attention module is about to update."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Cache):
            layer = value.layers[attention.layer_idx] if value.layers else None
            if isinstance(layer, LatentLayer):
                route = layer.route
                x = args[route.x] if isinstance(route.x, int) else kwargs[route.x]
                layer.call = Call(attention, x, kwargs.get(route.position_ids))


def _remove(handles: Iterable[Any]) -> None:
    for handle in handles:
        handle.remove()
