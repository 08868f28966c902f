"""All sites of a graph, and its near-misses, from the facts of one sweep."""

from collections.abc import Iterator
from dataclasses import replace

from torch import fx

from flashsvd_compile.analysis.attention_sites import attention_site
from flashsvd_compile.analysis.axes import volume
from flashsvd_compile.analysis.facts import AttentionCandidate, Facts
from flashsvd_compile.analysis.feed_forward_sites import feed_forward_site
from flashsvd_compile.analysis.low_rank import is_low_rank, lifts_of_latents
from flashsvd_compile.analysis.outer_factors import chain_ends
from flashsvd_compile.analysis.regions import check_rectangular
from flashsvd_compile.analysis.site_records import (
    AttentionSite,
    ChainEnds,
    ChainSite,
    FeedForwardSite,
    Outer,
    Site,
    Skip,
)
from flashsvd_compile.reason import Code, Reason, module_path, reason_at


def find_sites(facts: Facts, graph: fx.Graph) -> tuple[list[Site], list[Skip]]:
    """Sites in graph order, and near-misses with what stood in the way."""
    sites: list[Site] = []
    skips = [Skip(m.kind, m.node, module_path(m.node), m.reason) for m in facts.misses]
    lifts = lifts_of_latents(facts)
    for candidate in facts.candidates:
        found: Site | Reason | None
        if isinstance(candidate, AttentionCandidate):
            kind, node = "attention", candidate.node
            found = attention_site(facts, candidate)
        else:
            kind, node = "feed_forward", candidate.down.node
            found = feed_forward_site(facts, candidate, lifts)
        if found is not None and not isinstance(found, Reason):
            found = check_rectangular(node) or found
        if isinstance(found, Reason):
            skips.append(Skip(kind, node, module_path(node), found))
        elif found is not None:
            sites.append(found)
    taken = frozenset().union(*(site.region for site in sites))
    sites = [_apart(site, taken) for site in sites]
    # What attention may leave to others is a chain if it does not.
    shared = {
        lift for site in sites if isinstance(site, AttentionSite) for lift in _lifts_left_by(site)
    }
    for chain in _chains(facts, taken - shared):
        ragged = check_rectangular(chain.node)
        if ragged is None:
            sites.append(chain)
        else:
            skips.append(Skip("chain", chain.node, chain.where, ragged))
    order = {node: index for index, node in enumerate(graph.nodes)}
    return sorted(sites, key=lambda s: order[s.node]), sorted(skips, key=lambda s: order[s.node])


def _lifts_left_by(site: AttentionSite) -> Iterator[fx.Node]:
    """Lifts of ``site`` that stay in the graph in some of the ways to run it."""
    if site.query.rotation is not None:
        yield site.query.rotation.lift
    yield from (shared.lift for shared in site.shared)
    if site.unturned is not None:
        yield from _lifts_left_by(site.unturned)


def _apart(site: Site, taken: frozenset[fx.Node]) -> Site:
    """``site`` without outer factors that reach into another site, as ``taken`` tells."""
    if not isinstance(site, FeedForwardSite) or not isinstance(site.outer, Outer):
        return site
    shared = (site.outer.region - site.region) & taken
    return replace(site, outer=_belongs_elsewhere(shared)) if shared else site


def _belongs_elsewhere(shared: frozenset[fx.Node]) -> Reason:
    node = min(shared, key=lambda node: node.name)
    observed = f"{node.name} belongs to another site"
    return reason_at(node, Code.LATENT_HAS_OTHER_USER, observed, "no reader outside")


def _chains(facts: Facts, taken: frozenset[fx.Node]) -> list[ChainSite]:
    """The lifts of latents that no site has ``taken``."""
    chains = []
    for node, fact in facts.factored.items():
        inner = facts.factored.get(fact.latent.node)
        if inner is None or node is not fact.lift or node in taken or not is_low_rank(facts, fact):
            continue
        chains.append(
            ChainSite(
                node,
                module_path(node),
                frozenset({node}),
                fact,
                rank=int(fact.rank_size(facts.space)),
                in_width=int(inner.rank_size(facts.space)),
                out_width=int(volume(fact.lifted_atoms(facts.space))),
                ends=_chain_ends(facts, node, taken),
            )
        )
    return chains


def _chain_ends(facts: Facts, lift: fx.Node, taken: frozenset[fx.Node]) -> ChainEnds | Reason:
    """Those of a chain whose latent no larger site makes: that would be made twice."""
    ends = chain_ends(facts, lift)
    shared = ends.entry.region & taken if isinstance(ends, ChainEnds) else frozenset()
    return _belongs_elsewhere(shared) if shared else ends
