"""Tensors into the places of a model that has none yet: each once, tied ones as one parameter."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flashsvd_compile.checkpoints.errors import CheckpointError, listed, nearest
from flashsvd_compile.checkpoints.factors import Factors
from flashsvd_compile.checkpoints.names import prefix_of, resolve
from flashsvd_compile.compress.linears import Linear, replace_
from flashsvd_compile.compress.modules import (
    FusedPerHeadLowRankLinear,
    LowRankLinear,
    PerHeadLowRankLinear,
)

LowRank = LowRankLinear | PerHeadLowRankLinear | FusedPerHeadLowRankLinear

# Buffers that old releases of transformers stored in places where models have none now.
_STALE = (r"rotary_emb\.inv_freq$", r"embeddings\.position_ids$")


@dataclass
class Placer:
    """Owns what it places, if it ``copies``: a file may change or go once a model is loaded.

    A tensor that is given for two places, the same memory in the same shape, becomes one parameter.
    ``device`` None is the tensors' own.
    """

    device: torch.device | str | None = None
    copies: bool = True
    # With each parameter the tensor that it was made of, whose memory is then no other's.
    _made: dict[tuple[Any, ...], tuple[nn.Parameter, Tensor]] = field(default_factory=dict)

    def parameter(self, name: str, tensor: Tensor, dtype: torch.dtype | None) -> nn.Parameter:
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, dtype)
        if tensor.numel() and key in self._made:
            return self._made[key][0]
        value = self.owned(name, tensor, dtype)
        parameter = nn.Parameter(value, requires_grad=value.is_floating_point())
        self._made[key] = parameter, tensor
        return parameter

    def owned(self, name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Contiguous, and a copy unless told otherwise; raises `CheckpointError` where a cast makes
        values infinite."""
        if dtype is None or not tensor.is_floating_point():
            dtype = tensor.dtype
        device = self.device or tensor.device
        value = tensor.detach().to(device, dtype, copy=self.copies).contiguous()
        if dtype != tensor.dtype and value.isfinite().sum().item() < tensor.isfinite().sum().item():
            raise CheckpointError(f"{name} has values that are not finite in {dtype}")
        return value


def place_factors(
    model: nn.Module,
    linear: Linear,
    factors: Factors,
    method: str,
    dtype: torch.dtype | None,
    placer: Placer,
) -> None:
    """A low-rank module in the place of ``linear``, with ``factors`` cast to ``dtype``."""
    path = linear.path
    module = low_rank_module(factors.u.shape, factors.v.shape)
    module.u = placer.parameter(path, factors.u, dtype)
    module.v = placer.parameter(path, factors.v, dtype)
    if factors.bias is not None:
        module.bias = placer.parameter(path, factors.bias, dtype)
    module.method = method
    replace_(model, linear.paths, module)


def low_rank_module(u: torch.Size, v: torch.Size) -> LowRank:
    """The module for factors of these shapes, on the meta device and without a bias."""
    rank, in_features = u[-2:]
    with torch.device("meta"):
        if len(u) == 2:
            return LowRankLinear(in_features, v[0], rank, bias=False)
        if len(u) == 3:
            return PerHeadLowRankLinear(in_features, v[0], v[1], rank, bias=False)
        return FusedPerHeadLowRankLinear(in_features, v[0], v[1], v[2], rank, bias=False)


def place_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, placer: Placer
) -> None:
    """All that ``model`` still lacks from ``tensors``; ``dtype`` None keeps each tensor's own.

    Raises `CheckpointError` for tensors that the model has no place for, for places without a
    tensor, and for other shapes.
    """
    places = _places(model)
    given = _given(model, places, tensors)
    missing = []
    for names in _tied(places):
        held = [name for name in names if name in given]
        if not held:
            missing.append(names[0])
        for name in names if held else ():
            # Tied places take one tensor, unless the file has another one for each.
            source = held[0] if name not in given or _same(given, held[0], name) else name
            _place(model, name, *given[source], dtype, placer)
    if missing:
        raise CheckpointError(f"no tensors for {listed(missing)}{nearest(missing[0], tensors)}")


def check_complete(model: nn.Module) -> None:
    """Raise `CheckpointError` where anything is still on the meta device."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise CheckpointError(f"{name} has no value: no checkpoint holds it")


def _places(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that are still on the meta device, and all buffers that are stored."""
    state = model.state_dict(keep_vars=True)
    return {k: v for k, v in state.items() if v.is_meta or not isinstance(v, nn.Parameter)}


def _given(
    model: nn.Module, places: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, tuple[str, Tensor]]:
    """place -> the tensor for it and the name under which it is stored."""
    prefix = prefix_of(model)
    given: dict[str, tuple[str, Tensor]] = {}
    unexpected = []
    for name, tensor in tensors.items():
        place = resolve(name, places, prefix)
        if place is None:
            unexpected.append(name)
            continue
        if tensor.shape != places[place].shape:
            raise CheckpointError(
                f"{name} is {list(tensor.shape)}, the model's is {list(places[place].shape)}"
            )
        if tensor.is_floating_point() != places[place].is_floating_point():
            dtypes = [str(t.dtype).removeprefix("torch.") for t in (tensor, places[place])]
            raise CheckpointError(f"{name} is {dtypes[0]}, the model's is {dtypes[1]}")
        if place in given and not torch.equal(given[place][1], tensor):
            raise CheckpointError(f"{given[place][0]} and {name} are for one place and differ")
        given[place] = (name, tensor)
    ignored = (*_STALE, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()))
    computed = {name for name, _ in model.named_buffers()}
    unexpected = [
        name for name in unexpected
        if resolve(name, computed, prefix) is None and not any(re.search(p, name) for p in ignored)
    ]  # fmt: skip
    if unexpected:
        free = [place for place in places if place not in given]
        raise CheckpointError(
            f"the model has no place for {listed(unexpected)}{nearest(unexpected[0], free)}"
        )
    return given


def _tied(places: Mapping[str, Tensor]) -> list[list[str]]:
    """Places by parameter, in order."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name, tensor in places.items():
        groups[id(tensor)].append(name)
    return list(groups.values())


def _same(given: Mapping[str, tuple[str, Tensor]], a: str, b: str) -> bool:
    return a == b or torch.equal(given[a][1], given[b][1])


def _place(
    model: nn.Module,
    place: str,
    name: str,
    tensor: Tensor,
    dtype: torch.dtype | None,
    placer: Placer,
) -> None:
    parent, _, own = place.rpartition(".")
    module = model.get_submodule(parent)
    if own in module._parameters:
        module._parameters[own] = placer.parameter(name, tensor, dtype)
    else:
        module._buffers[own] = placer.owned(name, tensor, dtype)
