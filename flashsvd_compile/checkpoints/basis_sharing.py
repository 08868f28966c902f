"""Basis Sharing: layers that share their down factor, stored once, twice or for each of them.

    model.layers.3.self_attn.q_basis.weight    layer-local, [r, in]
    model.q_basis.3.weight                     the same tensor again, by layer
    q_groups = [[0, 1], [2, 3]]                in the config: who shares

A file may keep any of these and leave out the others. Afterwards every layer that has a basis has
a layer-local one, equal ones are one tensor, and the second names are gone. Contents decide what is
shared; the config only fills in what is not stored.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

_LINEAR = re.compile(r"(?P<parent>(?:.*\.)?(?:layers|h)\.(?P<layer>\d+)\.(?:.*\.)?)(?P<name>\w+)")
_BY_LAYER = re.compile(r"(?:.*\.)?(?P<stem>\w+)_basis\.(?P<layer>\d+)\.weight")


def complete_bases(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], linears: Collection[str]
) -> dict[str, Tensor]:
    """``tensors`` with a basis for every layer that has one, and one object for equal bases."""
    by_layer = {
        (match["stem"], int(match["layer"])): name
        for name in tensors
        if (match := _BY_LAYER.fullmatch(name))
    }
    completed = {k: v for k, v in tensors.items() if k not in by_layer.values()}
    local = {}  # (stem, layer) -> name of the layer-local basis
    for path in linears:
        if match := _LINEAR.fullmatch(path):
            stem = match["name"].removesuffix("_proj")
            local[stem, int(match["layer"])] = f"{match['parent']}{stem}_basis.weight"

    def stored(stem: str, layer: int) -> Tensor | None:
        name = local.get((stem, layer), "")
        other = by_layer.get((stem, layer), "")
        return tensors.get(name, tensors.get(other))

    bases: dict[str, list[Tensor]] = defaultdict(list)
    for (stem, layer), name in local.items():
        members = (layer, *_sharers(config, stem, layer))
        basis = next((b for m in members if (b := stored(stem, m)) is not None), None)
        if basis is not None:
            completed[name] = _one_object(basis, bases[stem])
    return completed


def _sharers(config: Mapping[str, Any], stem: str, layer: int) -> list[int]:
    """Layers that the config says share ``layer``'s basis; none where it says nothing of use."""
    groups = config.get(f"{stem}_groups")
    for group in groups if isinstance(groups, list) else ():
        if isinstance(group, list) and layer in group:
            return [member for member in group if type(member) is int]
    return []


def _one_object(basis: Tensor, known: list[Tensor]) -> Tensor:
    """The known tensor that equals ``basis``, or itself, then known."""
    for other in known:
        if other is basis or (other.dtype == basis.dtype and torch.equal(other, basis)):
            return other
    known.append(basis)
    return basis
