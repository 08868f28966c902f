"""All sites of a graph, and its near-misses, from the facts of one sweep."""

from torch import fx

from flashsvd_compile.analysis.attention_sites import attention_site
from flashsvd_compile.analysis.axes import volume
from flashsvd_compile.analysis.facts import AttentionCandidate, Facts
from flashsvd_compile.analysis.feed_forward_sites import feed_forward_site
from flashsvd_compile.analysis.low_rank import is_low_rank, lifted_latents
from flashsvd_compile.analysis.site_records import ChainSite, Site, Skip
from flashsvd_compile.reason import Reason, module_path


def find_sites(facts: Facts, graph: fx.Graph) -> tuple[list[Site], list[Skip]]:
    """Sites in graph order, and near-misses with what stood in the way."""
    sites: list[Site] = []
    skips = [Skip(m.kind, m.node, module_path(m.node), m.reason) for m in facts.misses]
    latents = lifted_latents(facts)
    for candidate in facts.candidates:
        found: Site | Reason | None
        if isinstance(candidate, AttentionCandidate):
            kind, node, found = "attention", candidate.node, attention_site(facts, candidate)
        else:
            kind, node = "feed_forward", candidate.down.node
            found = feed_forward_site(facts, candidate, latents)
        if isinstance(found, Reason):
            skips.append(Skip(kind, node, module_path(node), found))
        elif found is not None:
            sites.append(found)
    sites += _chains(facts, taken=frozenset().union(*(site.region for site in sites)))
    order = {node: index for index, node in enumerate(graph.nodes)}
    return sorted(sites, key=lambda s: order[s.node]), sorted(skips, key=lambda s: order[s.node])


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
            )
        )
    return chains
