"""Basis Sharing: layers that share their down factor, stored once, twice or for each of them.

    model.layers.3.self_attn.q_basis.weight    beside the linear, [r, in]
    model.q_basis.3.weight                     the same tensor, by layer; in some families the only
    q_groups = [[0, 1], [2, 3]]                in the config: who shares

A file may keep any of these and leave out the others. Afterwards every linear that has a basis has
one beside it, equal ones are one tensor, and its name by layer is gone. Contents decide what is
shared; the config only fills in what is not stored.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from flashsvd_compile.checkpoints.errors import CheckpointError

_LINEAR = re.compile(r"(?:.*\.)?(?:layers|h)\.(?P<layer>\d+)\.(?P<name>.+)")
_BY_LAYER = re.compile(r"(?:.*\.)?(?P<stem>\w+)_basis\.(?P<layer>\d+)\.weight")

# What bases are called whose linear is called otherwise (q is q_proj, and so on).
_STEMS = {
    "self_attn.out_proj": "o", "fc1": "up", "fc2": "down",  # OPT
    "attn.c_attn": "attn", "attn.c_proj": "o", "mlp.c_fc": "up", "mlp.c_proj": "down",  # GPT-2
}  # fmt: skip


def complete_bases(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], linears: Collection[str]
) -> dict[str, Tensor]:
    """``tensors`` with a basis beside each linear that has one, and one object for equal bases."""
    by_layer = {
        (match["stem"], int(match["layer"])): name
        for name in tensors
        if (match := _BY_LAYER.fullmatch(name))
    }
    beside = {}  # (stem, layer) -> name of the basis beside the linear
    for path in linears:
        if match := _LINEAR.fullmatch(path):
            name = match["name"]
            stem = _STEMS.get(name, name.rpartition(".")[2].removesuffix("_proj"))
            beside[stem, int(match["layer"])] = f"{path.removesuffix('_proj')}_basis.weight"

    def stored(stem: str, layer: int) -> Tensor | None:
        names = (beside.get((stem, layer), ""), by_layer.get((stem, layer), ""))
        held = [name for name in names if name in tensors]
        if len(held) > 1 and not torch.equal(tensors[held[0]], tensors[held[1]]):
            raise CheckpointError(f"{held[0]} and {held[1]} are for one layer and differ")
        return tensors[held[0]] if held else None

    used = {name for place, name in by_layer.items() if place in beside}
    completed = {name: t for name, t in tensors.items() if name not in used}
    bases: dict[str, list[Tensor]] = defaultdict(list)
    for (stem, layer), name in beside.items():
        members = (layer, *_sharers(config, stem, layer))
        basis = next((b for member in members if (b := stored(stem, member)) is not None), None)
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
