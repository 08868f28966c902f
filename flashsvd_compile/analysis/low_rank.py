"""Which factored tensors are low-rank in earnest: a weight alone makes a matmul, not a latent."""

import sympy
from torch import fx

from flashsvd_compile.analysis.axes import volume
from flashsvd_compile.analysis.factored import Factored
from flashsvd_compile.analysis.facts import Facts
from flashsvd_compile.reason import Reason


def is_low_rank(facts: Facts, fact: Factored) -> bool:
    """Is the latent narrower than what it came from and what it becomes?

    It must itself be a product with a factor (then it is narrower than that product's input), or
    an input of the graph, or such tensors one after the other: latents of more tokens, as a cache
    of latents has them.
    """
    rank, width = fact.rank_size(facts.space), volume(fact.lifted_atoms(facts.space))
    if not isinstance(rank, sympy.Integer) or not isinstance(width, sympy.Integer):
        return False
    if fact.latent.node in facts.inputs:
        return bool(rank < width)
    if (along := facts.appended.get(fact.latent.node)) is not None:
        leaves = facts.space.leaves
        return bool(rank < width) and not set(leaves(along)) & set(leaves(fact.rank))
    inner = facts.factored.get(fact.latent.node)
    return inner is not None and bool(rank < inner.rank_size(facts.space)) and bool(rank <= width)


def lifts_of_latents(facts: Facts) -> dict[fx.Node, list[fx.Node]]:
    """Products that are lifted, each with the lifts: it, or a layout of it, is their latent.

    The lifts stand in graph order; where only their concatenation is low-rank there are none.
    """
    found: dict[fx.Node, list[fx.Node]] = {}
    for node, fact in facts.factored.items():
        inner = facts.factored.get(fact.latent.node)
        if inner is not None and is_low_rank(facts, fact):
            lifts = found.setdefault(inner.lift, [])
            if node is fact.lift:
                lifts.append(node)
    return found


def lost_in_earnest(facts: Facts, node: fx.Node) -> Reason | None:
    """Where ``node`` stopped being low-rank, if it once was."""
    lost = facts.lost.get(node)
    if lost is None or not any(is_low_rank(facts, facts.factored[s]) for s in lost.region.sources):
        return None
    return lost.reason
