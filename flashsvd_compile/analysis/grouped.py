"""One latent lifted group by group and concatenated, read as one lift with a group axis.

g0 = linear(P[..., :r], u0);  g1 = linear(P[..., r:], u1)
K = cat([g0, g1], -1)            K[b, m, (g, f)] = P[b, m, (g, r)] · stack(u0, u1)[g, f, r]
"""

from collections.abc import Mapping, Sequence

import sympy
from torch import fx

from flashsvd_compile.analysis.axes import Atom, AxisSpace, Dim, Dims, same, volume
from flashsvd_compile.analysis.calls import tensor_inputs
from flashsvd_compile.analysis.factored import Bias, Factored, Labelled, expose
from flashsvd_compile.analysis.layout import Cut


def join_groups(
    space: AxisSpace,
    axes: Mapping[fx.Node, Dims],
    parts: Sequence[Factored],
    dims: Sequence[Dims],
    axis: int,
) -> tuple[Factored, Dims] | None:
    """The concatenation of ``parts`` along ``axis`` as one factored tensor, and its dimensions.

    The parts' ranks and widths must be equal. Where their latents are consecutive cuts of one
    tensor, that tensor is the latent; else it is their stack (a copy of latents, not of lifts).
    """
    if not all(_is_plain(part) for part in parts):
        return None
    widths = [volume(space.leaves(d[axis])) for d in dims]
    ranks = [part.rank_size(space) for part in parts]
    if any(not same(w, widths[0]) for w in widths) or any(not same(r, ranks[0]) for r in ranks):
        return None

    found = _one_latent(space, axes, parts)
    if found is None:
        group, rank = space.fresh((sympy.Integer(len(parts)), ranks[0]))
        latents = [p.latent for p in parts]
        latent = _stack(space, latents, [_renaming(space, {p.rank: rank}) for p in parts], group)
    else:
        latent, group, rank = found
    (width,) = space.fresh((widths[0],))
    names = [
        _renaming(space, {p.rank: rank, d[axis]: width}) for p, d in zip(parts, dims, strict=True)
    ]
    factor = _stack(space, [p.factor for p in parts], names, group)
    biases = [_stack(space, [p.biases[i].tensor for p in parts], names, group)
              for i in range(len(parts[0].biases))]  # fmt: skip
    if latent is None or factor is None or None in biases:
        return None
    joined = Factored(
        parts[0].lift, latent, factor, rank, tuple(Bias(b, 1.0) for b in biases if b is not None)
    )
    return joined, (*dims[0][:axis], (*group, *width), *dims[0][axis + 1 :])


def _is_plain(part: Factored) -> bool:
    tensors = [part.latent, part.factor, *(bias.tensor for bias in part.biases)]
    return (
        part.scale == 1.0
        and all(bias.scale == 1.0 for bias in part.biases)
        and all(len(t.nodes) == 1 and not t.cuts for t in tensors)
    )


def _renaming(space: AxisSpace, names: dict[Dim, Dim]) -> dict[Dim, Dim]:
    """By leaves; a dimension of size 1 has none and needs no name."""
    return {space.leaves(dim): name for dim, name in names.items() if dim}


def _stack(
    space: AxisSpace, tensors: Sequence[Labelled], names: Sequence[dict[Dim, Dim]], group: Dim
) -> Labelled | None:
    """The tensors on top of each other, if renaming makes their dimensions the same."""
    renamed = {
        tuple(name.get(space.leaves(dim), space.leaves(dim)) for dim in tensor.dims)
        for tensor, name in zip(tensors, names, strict=True)
    }
    if len(renamed) != 1:
        return None
    return Labelled(tuple(tensor.node for tensor in tensors), (group, *renamed.pop()))


def _one_latent(
    space: AxisSpace, axes: Mapping[fx.Node, Dims], parts: Sequence[Factored]
) -> tuple[Labelled, Dim, Dim] | None:
    """The tensor that the parts' latents are consecutive cuts of, with its group and rank."""
    origins = [space.origin(part.rank[0]) if len(part.rank) == 1 else None for part in parts]
    if any(origin is None for origin in origins):
        return None
    whole, start = origins[0]  # type: ignore[misc]
    rank = parts[0].rank_size(space)
    bases = {_holder(space, axes, part.latent.node, whole) for part in parts}
    if len(bases) != 1 or (base := bases.pop()) is None:
        return None
    for index, origin in enumerate(origins):
        if origin != (whole, start + index * rank):
            return None
    length = len(parts) * rank
    latent = Labelled((base,), axes[base])
    cut_to = whole
    if not same(whole.size, length):
        cut_to = space.narrow(whole, start, length)
        latent = latent.cut(space, Cut(whole, start, cut_to))
    split = space.regroup(((cut_to,),), (sympy.Integer(len(parts)), rank))
    return None if split is None else (latent, split[0], split[1])


def _holder(
    space: AxisSpace, axes: Mapping[fx.Node, Dims], node: fx.Node, atom: Atom
) -> fx.Node | None:
    """The nearest tensor above ``node`` that still has ``atom`` whole."""
    while True:
        inputs = tensor_inputs(node) if node.op == "call_function" else []
        above = inputs or [n for n in node.all_input_nodes if n.op == "call_function"]
        if not above:
            return None
        node = above[0]
        if node in axes and atom in expose(space, tuple(a for d in axes[node] for a in d), atom):
            return node
