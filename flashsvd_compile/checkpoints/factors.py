"""Stored parts of a linear → ``u`` and ``v`` as this package's modules hold them.

The chain of shapes decides which matrix is down [r, in] and which up [out, r]; what a layout calls
them does not. Only where both orders fit (all sides equal) do its letters count. Parts in several
blocks become one module with a leading axis, whose rank is the largest: smaller blocks are padded
with zeros, which changes no result and costs the padding.

===========================  ==========================  =================
stored                       u                           v
===========================  ==========================  =================
one pair of matrices         [r, in]                     [out, r]
a pair with a heads axis     [H, r, in]                  [H, D, r]
one down, G ups (Palu)       [G, r, in]                  [G, out/G, r]
P pairs with heads (GPT-2)   [P, H, r, in]               [P, H, D, r]
===========================  ==========================  =================
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flashsvd_compile.checkpoints.errors import CheckpointError
from flashsvd_compile.checkpoints.rules import Part, Parts, Role
from flashsvd_compile.compress.linears import DTYPES

# What the shapes say of the roles that a layout's letters give to two matrices.
Order = Literal["as told", "swapped", "either"]


@dataclass(frozen=True)
class Factors:
    """``u`` [.., r, in], ``v`` [.., rows, r], ``bias`` [out] or None: views of files, as stored.

    ``order`` is "either" where all sides are equal, so that the letters alone have decided.
    """

    u: Tensor
    v: Tensor
    bias: Tensor | None
    order: Order


@dataclass(frozen=True)
class _Pair:
    """Two factors that belong together, as stored, with the biases that lie on them."""

    down: Part
    up: Part
    down_bias: Part | None
    up_bias: Part | None

    @property
    def told(self) -> str:
        return f"{self.down.name} {_shape(self.down)} and {self.up.name} {_shape(self.up)}"


def assemble(path: str, out_features: int, in_features: int, parts: Parts) -> Factors:
    """The factors of the linear at ``path``; raises `CheckpointError` where they are none."""
    pairs = _pairs(path, out_features, parts)
    rows = out_features // len(pairs)
    orders: set[Order] = set()
    blocks, biases = [], []
    for pair in pairs:
        orders.add(order := _order(path, rows, in_features, pair))
        if order == "swapped":
            pair = _Pair(_as_down(pair.up), _as_up(pair.down), pair.up_bias, pair.down_bias)
        u, v = _canonical(pair.down, "hri"), _canonical(pair.up, "hor")
        blocks.append((u, v))
        biases.append(_bias(path, rows, pair, v))
    _check_blocks(path, out_features, in_features, pairs, blocks)
    u, v = _joined(blocks)
    of_all = next(order for order in ("swapped", "either", "as told") if order in orders)
    return Factors(u, v, _joined_bias(path, biases), of_all)


# ---- pairs --------------------------------------------------------------------------------------


def _pairs(path: str, out_features: int, parts: Parts) -> list[_Pair]:
    """Downs and ups by block; one down for several ups is cut into theirs."""
    downs, ups = parts.by_role["down"], parts.by_role["up"]
    for role, mine, other in (("up", ups, downs), ("down", downs, ups)):
        if not mine:
            names = ", ".join(part.name for part in other.values())
            raise CheckpointError(f"{path}: {names} has no counterpart, the {role} factor")
    if set(downs) == {""} and set(ups) != {""}:
        downs = _cut(path, downs[""], ups)
    if set(downs) != set(ups):
        apart = set(downs) ^ set(ups)
        alone = [p.name for found in (downs, ups) for k, p in found.items() if k in apart]
        raise CheckpointError(f"{path}: {', '.join(alone)} has no counterpart factor")
    order = sorted(ups, key=_block_order)
    ranks = [downs[k].tensor.shape[:1].numel() for k in order]
    rows = [out_features // len(order)] * len(order)
    down_biases = _biases_by_block(path, parts, "down_bias", order, ranks)
    up_biases = _biases_by_block(path, parts, "up_bias", order, rows)
    return [_Pair(downs[k], ups[k], down_biases.get(k), up_biases.get(k)) for k in order]


def _biases_by_block(
    path: str, parts: Parts, role: Role, order: list[str], sizes: list[int]
) -> Mapping[str, Part]:
    """The biases of each block; one of the whole linear is cut into theirs, of ``sizes``."""
    biases = parts.by_role[role]
    if not set(biases) - set(order):
        return biases
    if set(biases) != {""}:
        raise CheckpointError(f"{path}: {_told([*biases.values()])} are for the same or no block")
    whole = biases[""]
    if whole.tensor.numel() != sum(sizes):
        raise CheckpointError(
            f"{path}: {whole.name} is {_shape(whole)}, expected {sum(sizes)} values"
        )
    cut = whole.tensor.flatten().split(sizes)
    return {k: Part(whole.name, values, whole.axes) for k, values in zip(order, cut, strict=True)}


def _block_order(block: str) -> tuple[int, str]:
    """Groups by number; query, key and value, which are no numbers, in that order."""
    return (int(block), "") if block.isdigit() else ("qkv".find(block), block)


def _cut(path: str, down: Part, ups: Mapping[str, Part]) -> dict[str, Part]:
    """The rows of ``down`` [Σ r, in] that belong to each up [rows, r], in order of the blocks."""
    order = sorted(ups, key=_block_order)
    if order != [str(i) for i in range(len(order))]:
        raise CheckpointError(f"{path}: groups {', '.join(order)}; one before the last is missing")
    matrices = [down, *(ups[k] for k in order)]
    if any(part.tensor.dim() != 2 for part in matrices):
        raise CheckpointError(f"{path}: groups must be matrices, {_told(matrices)}")
    ranks = [ups[k].tensor.shape[1] for k in order]
    if sum(ranks) != down.tensor.shape[0] or len({ups[k].tensor.shape[0] for k in order}) > 1:
        raise CheckpointError(
            f"{path}: the groups do not make up {down.name}: {_told(matrices)}; expected "
            "[sum of ranks, in] and [group, rank] each"
        )
    cut = down.tensor.split(ranks)
    return {k: Part(down.name, rows, down.axes) for k, rows in zip(order, cut, strict=True)}


# ---- shapes -------------------------------------------------------------------------------------


def _order(path: str, rows: int, in_features: int, pair: _Pair) -> Order:
    """Which of the two is the down factor; raises where neither order is a chain."""
    if (pair.down.axes, pair.up.axes) != ("ri", "or"):
        return "as told"  # raw tensors, whose axes the layout knows: checked in `_check_blocks`
    if any(part.tensor.dim() != 2 for part in (pair.down, pair.up)):
        raise CheckpointError(f"{path}: {pair.told} must be matrices")

    def is_chain(down: Tensor, up: Tensor) -> bool:
        return down.shape[1] == in_features and up.shape == (rows, down.shape[0])

    fits = is_chain(pair.down.tensor, pair.up.tensor)
    if is_chain(pair.up.tensor, pair.down.tensor):
        return "either" if fits else "swapped"
    if fits:
        return "as told"
    raise CheckpointError(
        f"{path} is [{rows}, {in_features}], and {pair.told} do not multiply to it in either order"
    )


def _as_down(part: Part) -> Part:
    return Part(part.name, part.tensor, "ri")


def _as_up(part: Part) -> Part:
    return Part(part.name, part.tensor, "or")


def _canonical(part: Part, order: str) -> Tensor:
    """The tensor with its axes in ``order``, those that it has; axes of size 1 are dropped."""
    _check_dtype(part)
    tensor, axes = part.tensor, part.axes
    while axes.startswith("1"):
        axes = axes[1:]
        if tensor.dim() > len(axes) and tensor.shape[0] == 1:
            tensor = tensor[0]
    if tensor.dim() != len(axes):
        names = ", ".join({"h": "heads", "r": "rank", "i": "in", "o": "out"}[a] for a in axes)
        raise CheckpointError(f"{part.name} is {_shape(part)}, expected [{names}]")
    return tensor.permute([axes.index(axis) for axis in order if axis in axes])


def _check_dtype(part: Part) -> None:
    if part.tensor.dtype not in DTYPES:
        dtype = str(part.tensor.dtype).removeprefix("torch.")
        raise CheckpointError(f"{part.name} is {dtype}, expected floating-point values")


def _check_blocks(
    path: str,
    out_features: int,
    in_features: int,
    pairs: list[_Pair],
    blocks: list[tuple[Tensor, Tensor]],
) -> None:
    for pair, (u, v) in zip(pairs, blocks, strict=True):
        rank = u.shape[-2]
        if u.shape[-1] != in_features or v.shape[-1] != rank or u.shape[:-2] != v.shape[:-2]:
            raise CheckpointError(
                f"{path} reads {in_features} features, and {pair.told} are no chain from there"
            )
        if not 1 <= rank <= min(v.shape[-2], in_features):
            raise CheckpointError(
                f"{path}: {pair.told} have rank {rank}, allowed are 1 to "
                f"{min(v.shape[-2], in_features)} for [{v.shape[-2]}, {in_features}]"
            )
    made = sum(v.shape[:-1].numel() for _, v in blocks)
    if made != out_features or len({v.shape[:-1] for _, v in blocks}) > 1:
        told = "; ".join(pair.told for pair in pairs)
        raise CheckpointError(f"{path} makes {out_features} features, not those of {told}")


def _joined(blocks: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(blocks) == 1:
        return blocks[0]
    rank = max(u.shape[-2] for u, _ in blocks)
    pad = torch.nn.functional.pad
    return (
        torch.stack([pad(u, (0, 0, 0, rank - u.shape[-2])) for u, _ in blocks]),
        torch.stack([pad(v, (0, rank - v.shape[-1])) for _, v in blocks]),
    )


# ---- biases -------------------------------------------------------------------------------------


def _bias(path: str, rows: int, pair: _Pair, v: Tensor) -> Tensor | None:
    """What the block adds to its rows, [rows] or None: b + V b_down, float64 where it is computed.

    A bias of the layer's size on the down factor can only be the layer's own.
    """
    up, down = pair.up_bias, pair.down_bias
    for part in (up, down):
        if part is not None:
            _check_dtype(part)
    if down is not None and up is None and down.tensor.numel() == rows != v.shape[-1]:
        up, down = down, None
    if up is not None and up.tensor.numel() != rows:
        raise CheckpointError(f"{path}: {up.name} is {_shape(up)}, expected {rows} values")
    own = None if up is None else up.tensor.flatten()
    if down is None:
        return own
    if v.dim() != 2 or down.tensor.shape != (v.shape[1],):
        raise CheckpointError(f"{path}: {down.name} is {_shape(down)}, expected [{v.shape[-1]}]")
    lifted = v.double() @ down.tensor.double()
    return lifted if own is None else lifted + own.double()


def _joined_bias(path: str, biases: list[Tensor | None]) -> Tensor | None:
    held = [bias for bias in biases if bias is not None]
    if not held:
        return None
    if len(held) != len(biases):
        raise CheckpointError(f"{path}: {len(held)} of {len(biases)} blocks have a bias")
    return held[0] if len(held) == 1 else torch.cat(held)


# ---- telling ------------------------------------------------------------------------------------


def _shape(part: Part) -> str:
    return str(list(part.tensor.shape))


def _told(parts: list[Part]) -> str:
    return ", ".join(f"{part.name} {_shape(part)}" for part in parts)
