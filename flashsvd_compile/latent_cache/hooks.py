"""What tells a cache the input of an attention module: one hook each, while a cache lives.

The hook holds nothing but its model's name. It looks for a cache of that name among what the module
was called with, so other caches see nothing of it, any number of caches share it, and a graph that
was compiled for one of them is right for all.
"""

import itertools
import weakref
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn

from flashsvd_compile.latent_cache.layers import Call

_LIVING: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[Hooks]]" = weakref.WeakKeyDictionary()
# A model keeps its name when its hooks come again: compiled code, which guards on what hooks hold,
# then fits them still.
_NAMES: "weakref.WeakKeyDictionary[nn.Module, str]" = weakref.WeakKeyDictionary()
_NUMBERS = itertools.count(1)


class Hooks:
    """Hooks on attention modules, for as long as somebody holds this object."""

    def __init__(self, attentions: Iterable[nn.Module], model_name: str) -> None:
        self.attentions = tuple(weakref.ref(attention) for attention in attentions)
        self.model_name = model_name
        hook = partial(tell, model_name)
        handles = [
            attention.register_forward_pre_hook(hook, with_kwargs=True)
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
        living = Hooks(attentions, _NAMES.setdefault(model, f"model {next(_NUMBERS)}"))
        _LIVING[model] = weakref.ref(living)
    return living


def tell(model_name: str, attention: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Leave the call's input with the layer that the attention module is about to update."""
    for cache in (*args, *kwargs.values()):
        if getattr(cache, "model_name", None) == model_name:
            layer = cache.layers[attention.layer_idx]
            place = layer.route.x
            x = args[place] if isinstance(place, int) else kwargs[place]
            layer.call = Call(attention, x, kwargs.get(layer.route.position_ids))


def _remove(handles: Iterable[Any]) -> None:
    for handle in handles:
        handle.remove()
