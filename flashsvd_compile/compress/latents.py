"""The latent spaces of a model's low-rank layers, and the parameters that write and read each.

=================  ==========================  =========================
latent             written by                  read by
=================  ==========================  =========================
of a layer         ``u``                       ``v``
of scores          the query's weight, bias    the key's weight, bias
of values          the value's weight, bias    the output's weight
=================  ==========================  =========================

A layer's latent is its own. Of narrow heads (``joint_modules.py``) two layers share one: they are
paired by names, as `compress_` finds heads, and by sizes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

import torch
from torch import Tensor, nn

from flashsvd_compile.compress.heads import find_projections
from flashsvd_compile.compress.joint_modules import NarrowHeadsLinear, NarrowInputLinear
from flashsvd_compile.compress.linears import holders_of, module_paths, parameter_bytes, sharing
from flashsvd_compile.compress.matrices import LowRank
from flashsvd_compile.compress.modules import (
    FusedPerHeadLowRankLinear,
    LowRankLinear,
    PerHeadLowRankLinear,
)
from flashsvd_compile.compress.own_layers import obstacle_of

FACTORED = (LowRankLinear, PerHeadLowRankLinear, FusedPerHeadLowRankLinear)
NARROW = (NarrowHeadsLinear, NarrowInputLinear)
Narrow = NarrowHeadsLinear | NarrowInputLinear


@dataclass(frozen=True)
class Layer:
    """A low-rank layer of the model, at ``paths``; ``obstacle`` says why it cannot be cut."""

    paths: tuple[str, ...]
    module: LowRank | Narrow
    obstacle: str

    @property
    def path(self) -> str:
        return self.paths[0]

    @property
    def bytes(self) -> int:
        """Of its factors, without the bias."""
        own = self.module.named_parameters(recurse=False)
        return sum(parameter_bytes(p) for name, p in own if name != "bias")


@dataclass(frozen=True)
class Side:
    """A parameter of ``module`` as [.., r, k]: by the ranks of the latent that it has a part in.

    ``lies``: "rows" where it is stored so, "columns" as [.., k, r], "flat" as [H·r], "inside" as
    [k, H, r].
    """

    module: nn.Module
    name: str
    lies: Literal["rows", "columns", "flat", "inside"]

    @property
    def parameter(self) -> nn.Parameter:
        found = self.module._parameters[self.name]
        assert found is not None
        return found

    def by_rank(self, values: Tensor) -> Tensor:
        """``values`` of the parameter's shape as [.., r, k]."""
        if self.lies == "columns":
            return values.mT
        if self.lies == "flat":
            return values.reshape(heads_of(self.module), -1, 1)
        return values.permute(1, 2, 0) if self.lies == "inside" else values

    def stored(self, by_rank: Tensor) -> Tensor:
        """The reverse, for any rank."""
        if self.lies == "columns":
            return by_rank.mT
        if self.lies == "flat":
            return by_rank.flatten()
        return by_rank.permute(2, 0, 1) if self.lies == "inside" else by_rank


def heads_of(module: nn.Module) -> int:
    """Of a narrow layer."""
    assert isinstance(module, NARROW)
    return module.num_heads


@dataclass(frozen=True)
class Latent:
    """A space of ``rank`` that ``writes`` go into and ``reads`` come out of, for each of its heads.

    ``group``: heads that a shared one of the other side meets; one side or the other has
    ``group`` times as many. ``layers``: one, or both of a pair.
    """

    kind: Literal["layer", "scores", "values"]
    layers: tuple[Layer, ...]
    writes: tuple[Side, ...]
    reads: tuple[Side, ...]
    group: int = 1

    @property
    def name(self) -> str:
        return " × ".join(layer.path for layer in self.layers)

    @property
    def rank(self) -> int:
        return self.layers[0].module.rank

    @property
    def bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers)

    def writing(self) -> Tensor:
        """[heads.., r, k] in float64, those of a group side by side."""
        return self._together(self.writes)

    def reading(self) -> Tensor:
        return self._together(self.reads)

    def _together(self, sides: Sequence[Side]) -> Tensor:
        values = torch.cat([side.by_rank(side.parameter.detach().double()) for side in sides], -1)
        return self.grouped(values)

    @property
    def shared_heads(self) -> int:
        return min(heads_of(layer.module) for layer in self.layers)

    def grouped(self, values: Tensor) -> Tensor:
        """``values`` [heads, r, k] of a side as [shared heads, r, group·k]."""
        if self.kind == "layer" or len(values) == self.shared_heads:
            return values
        heads = self.shared_heads
        return values.unflatten(0, (heads, self.group)).movedim(1, 2).flatten(2)


def find_layers(model: nn.Module) -> list[Layer]:
    """Every low-rank layer of this package, in the order of the model."""
    paths = module_paths(model)
    holders = holders_of(paths)
    found = []
    for module, own in paths.items():
        if not isinstance(module, (*FACTORED, *NARROW)):
            continue
        names: tuple[str, ...] = ("u", "v")
        if isinstance(module, NARROW):
            names = ("weight",)
        buffers = ["lift"] if isinstance(module, NarrowHeadsLinear) else []
        obstacle = obstacle_of(module, (*FACTORED, *NARROW), names, buffers)
        # The bias of narrow heads is one of latents, and narrowed with them.
        for name in (*names, *(["bias"] if buffers and module.bias is not None else [])):
            obstacle = obstacle or sharing(module, name, paths, holders)
        found.append(Layer(tuple(own), module, obstacle))
    return found


def find_latents(model: nn.Module, layers: Sequence[Layer]) -> tuple[list[Latent], dict[str, str]]:
    """The latents of ``layers``, and by path why some layers have none that can be cut."""
    latents = []
    for layer in layers:
        if isinstance(layer.module, FACTORED) and not layer.obstacle:
            writes, reads = Side(layer.module, "u", "rows"), Side(layer.module, "v", "columns")
            latents.append(Latent("layer", (layer,), (writes,), (reads,)))
    latents += _pairs(model, {layer.path: layer for layer in layers})
    paired = {layer.path for latent in latents for layer in latent.layers}
    reasons = {
        x.path: x.obstacle or "the other side of its heads cannot be cut, or is not found"
        for x in layers
        if x.path not in paired
    }
    return latents, reasons


def _pairs(model: nn.Module, layers: Mapping[str, Layer]) -> Iterator[Latent]:
    out_features = {
        path: module.out_features
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, *FACTORED, *NARROW))
    }
    for heads in find_projections(model, out_features):
        query, key = layers.get(heads.query), layers.get(heads.key)
        if _fit(query, key) and isinstance(key.module, NarrowHeadsLinear):  # type: ignore[union-attr]
            yield _latent("scores", query, key)  # type: ignore[arg-type]
        value = layers.get(heads.value)
        output = _output_of(value, layers) if value is not None else None
        if _fit(value, output):
            yield _latent("values", value, output)  # type: ignore[arg-type]


def _fit(first: Layer | None, second: Layer | None) -> bool:
    """Whether both can be cut, and meet in heads of one width and one rank."""
    if first is None or second is None or first.obstacle or second.obstacle:
        return False
    one, other = first.module, second.module
    if not isinstance(one, NarrowHeadsLinear) or not isinstance(other, NARROW):
        return False
    most, least = sorted((one.num_heads, other.num_heads), reverse=True)
    return (one.head_dim, one.rank) == (other.head_dim, other.rank) and most % least == 0


def _output_of(value: Layer, layers: Mapping[str, Layer]) -> Layer | None:
    """What reads the heads of ``value``: of those that fit, the one that is nearest by its path;
    None where several are as near."""
    near: dict[int, list[Layer]] = {}
    for path, layer in layers.items():
        if isinstance(layer.module, NarrowInputLinear) and _fit(value, layer):
            names = zip(path.split("."), value.path.split("."), strict=False)
            common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], names))
            near.setdefault(common, []).append(layer)
    if not near:
        return None
    nearest = near[max(near)]
    return nearest[0] if len(nearest) == 1 else None


def _latent(kind: Literal["scores", "values"], first: Layer, second: Layer) -> Latent:
    writes, reads = [Side(first.module, "weight", "rows")], []
    if first.module.bias is not None:
        writes.append(Side(first.module, "bias", "flat"))
    if kind == "scores":
        reads.append(Side(second.module, "weight", "rows"))
        if second.module.bias is not None:
            reads.append(Side(second.module, "bias", "flat"))
    else:
        reads.append(Side(second.module, "weight", "inside"))
    least, most = sorted(heads_of(layer.module) for layer in (first, second))
    group = most // least
    return Latent(kind, (first, second), tuple(writes), tuple(reads), group)
