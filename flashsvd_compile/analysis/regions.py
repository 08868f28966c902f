"""The nodes that a site would take the place of, and who else reads them.

    p -> linear(p, v) -> gelu -> linear(gelu, u)       from the product back to the latent p

A site may stand in for them only if nobody outside reads what they computed.
"""

from collections.abc import Iterable

from torch import fx

from flashsvd_compile.analysis.calls import is_nested, is_tensor, value
from flashsvd_compile.analysis.facts import Facts
from flashsvd_compile.reason import Code, Reason, module_path, reason_at


def between(facts: Facts, ends: Iterable[fx.Node], stop: set[fx.Node]) -> frozenset[fx.Node]:
    """Nodes from ``ends`` back to, and not including, ``stop``, weights and graph inputs."""
    found: set[fx.Node] = set()
    pending = [node for node in ends if node not in stop]
    while pending:
        node = pending.pop()
        if node in found:
            continue
        found.add(node)
        for above in node.all_input_nodes:
            computed = above.op == "call_function" and above not in facts.weights
            if computed and above not in stop and holds_tensors(above):
                pending.append(above)
    return frozenset(found)


def lift_region(facts: Facts, node: fx.Node) -> frozenset[fx.Node]:
    """Full-width nodes from the lift to ``node``; empty if ``node`` is not lifted."""
    fact = facts.factored.get(node)
    if fact is None:
        return frozenset()
    return between(facts, [node], {*fact.latent.nodes, *fact.factor.nodes})


def other_user(inside: Iterable[fx.Node], allowed: frozenset[fx.Node]) -> Reason | None:
    """A reason if a node of ``inside`` is read by anyone but ``allowed``."""
    for node in inside:
        for user in node.users:
            reads = user.op == "output" or holds_tensors(user)
            if reads and user not in allowed:
                observed = f"{node.name} is also read by {user.name}"
                return reason_at(node, Code.WIDE_HAS_OTHER_USER, observed, "no reader outside")
    return None


def holds_tensors(node: fx.Node) -> bool:
    return is_tensor(node) or isinstance(value(node), (list, tuple))


def check_rectangular(node: fx.Node) -> Reason | None:
    """A reason if ``node`` reads or makes a nested tensor: sites count rows of one length."""
    ragged = next((x for x in (node, *node.all_input_nodes) if is_nested(x)), None)
    if ragged is None:
        return None
    sizes = ", ".join(map(str, value(ragged).shape))
    return reason_at(node, Code.NESTED, f"{ragged.name} is a nested tensor, [{sizes}]",
                     "rows of one length, in a dense tensor")  # fmt: skip


def common_path(nodes: Iterable[fx.Node]) -> str:
    paths = [path.split(".") for node in nodes if (path := module_path(node))]
    common: list[str] = []
    for names in zip(*paths, strict=False):
        if len(set(names)) != 1:
            break
        common.append(names[0])
    return ".".join(common)
