"""Siblings: down-projections that read the same activations, and could run as one launch.

    p = linear(x, u_q);  …;  s = linear(x, u_k);  …;  t = linear(x.view(-1, 768), u_v)

are three products of one x. A family is all products of one tensor, however its leading
dimensions are viewed, with weights along its last dimension, that narrow it. What can run where
the first of them stands becomes a site; what cannot is told with the reason. That needs one
stretch of the graph without a switch of autocast or grad mode (and so one dtype), weights that lie
alike in memory, and operands that are there: views of weights can move ahead, other computations
stay.
"""

import itertools
import operator
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sympy
from torch import fx

from flashsvd_compile.analysis.axes import Size, same, shape_of, size_of
from flashsvd_compile.analysis.calls import aliased_argument, aten, is_tensor, packet, value
from flashsvd_compile.analysis.contraction import Contraction, read_contraction
from flashsvd_compile.analysis.facts import Facts
from flashsvd_compile.analysis.layout import is_layout
from flashsvd_compile.analysis.regions import check_rectangular, common_path
from flashsvd_compile.analysis.site_records import Sibling, SiblingsSite, Skip
from flashsvd_compile.kernels.siblings_tiles import MAX_SIBLINGS
from flashsvd_compile.reason import Code, Reason, module_path, reason_at

_VIEWS = {
    aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.squeeze,
    aten.unsqueeze, aten.view_as, aten.reshape_as, aten.alias,
}  # fmt: skip


@dataclass(frozen=True)
class _Candidate:
    """A product that narrows, and what stands in the way of sharing a launch with any other."""

    sibling: Sibling
    obstacle: Reason | None
    weight_is_rank_innermost: bool

    @property
    def node(self) -> fx.Node:
        return self.sibling.node


def find_siblings(facts: Facts, graph: fx.Graph) -> tuple[list[SiblingsSite], list[Skip]]:
    """Sites of two to MAX_SIBLINGS products in graph order, and near-misses.

    ``facts`` may be older than the graph: products that came later are no siblings.
    """
    families: dict[fx.Node, list[_Candidate]] = defaultdict(list)
    for node in graph.nodes:
        product = read_contraction(node) if node in facts.regions and is_tensor(node) else None
        if product is not None and (found := _candidate(facts, product)) is not None:
            families[_root(facts, found.sibling)].append(found)
    order = {node: index for index, node in enumerate(graph.nodes)}
    sites: list[SiblingsSite] = []
    misses: list[tuple[fx.Node, Reason]] = []
    for family in families.values():
        if len(family) > 1:
            _split(facts, family, order, sites, misses)
    skips = [Skip("siblings", node, module_path(node), reason) for node, reason in misses]
    return (
        sorted(sites, key=lambda site: order[site.node]),
        sorted(skips, key=lambda skip: order[skip.node]),
    )


# ---- one product --------------------------------------------------------------------------------


def _candidate(facts: Facts, product: Contraction) -> _Candidate | None:
    """``product`` as x · weight along x's last dimension, narrowing it; None where it is not."""
    left, right = product.left, product.right
    x_letters, weight_letters = product.left_letters, product.right_letters
    if left in facts.weights and right not in facts.weights:
        left, right, x_letters, weight_letters = right, left, weight_letters, x_letters
    shared = set(x_letters) & set(weight_letters)
    if left in facts.weights or not facts.is_given(right):
        return None
    if shared != {x_letters[-1]} or shared & set(product.out_letters):
        return None
    contracted = weight_letters.index(x_letters[-1])
    sizes = shape_of(value(right))
    features = sizes[contracted]
    width = _product(sizes[:contracted] + sizes[contracted + 1 :])
    if not isinstance(features, sympy.Integer) or not isinstance(width, sympy.Integer):
        return None
    if not 0 < width < features:
        return None
    columns = [letter for letter in weight_letters if letter != x_letters[-1]]
    computed = [*x_letters[:-1], *columns]
    sibling = Sibling(
        product.node, left, right, product.bias, contracted, int(width), int(features),
        order=tuple(computed.index(letter) for letter in product.out_letters),
    )  # fmt: skip
    strides = _matrix_strides(sibling)
    along_columns = len(columns) == 1 and product.out_letters[-1] == columns[0]
    obstacle = _check_alone(facts, sibling, strides, product.scale, along_columns)
    return _Candidate(sibling, obstacle, strides is not None and strides[1] != 1)


def _product(sizes: Iterable[Size]) -> Size:
    product: Size = sympy.Integer(1)
    for size in sizes:
        product = product * size
    return product


def _check_alone(
    facts: Facts,
    sibling: Sibling,
    strides: tuple[int, int] | None,
    scale: float,
    along_columns: bool,
) -> Reason | None:
    """What keeps a product from any launch with others; ``along_columns``: where a bias lies."""
    node, bias = sibling.node, sibling.bias
    operands = {sibling.x, sibling.weight, *([] if bias is None else [bias])}
    if written := operands & facts.mutated:
        return reason_at(node, Code.MUTATED, f"{written.pop().name} is written in place")
    if (ragged := check_rectangular(node)) is not None:
        return ragged
    if strides is None or 1 not in strides:
        lies = f"a weight with strides {tuple(value(sibling.weight).stride())}"
        required = "a matrix with one dimension innermost, without a copy"
        return reason_at(node, Code.BAD_LAYOUT, lies, required)
    if scale != 1:
        return reason_at(node, Code.OP_NOT_CARRIED, f"a product times {scale}", "no scale")
    if bias is not None and not (along_columns and _is_row(facts, sibling, bias)):
        observed = f"a bias of shape {list(value(bias).shape)}"
        return reason_at(node, Code.OP_NOT_CARRIED, observed, "one weight a column")
    return None


def _is_row(facts: Facts, sibling: Sibling, bias: fx.Node) -> bool:
    """Is it a weight of one number for each column?"""
    sizes = shape_of(value(bias))
    is_row = all(size == 1 for size in sizes[:-1]) and same(sizes[-1], sympy.Integer(sibling.width))
    return facts.is_given(bias) and is_row


def _matrix_strides(sibling: Sibling) -> tuple[int, int] | None:
    """(stride of columns, stride of features) of the weight as a matrix; None if it is no view."""
    weight = value(sibling.weight)
    sizes, strides = list(weight.shape), list(weight.stride())
    if not all(isinstance(number, int) for number in (*sizes, *strides)):
        return None
    features = strides.pop(sibling.contracted)
    sizes.pop(sibling.contracted)
    kept = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size != 1]
    for (_, outer), (size, inner) in itertools.pairwise(kept):
        if outer != size * inner:
            return None
    return (kept[-1][1] if kept else 1), features


def _root(facts: Facts, sibling: Sibling) -> fx.Node:
    """The tensor of which its x is the same rows, however the leading dimensions are grouped.

    A view that another region makes is a tensor of its own: no gradient may flow through it.
    Memory that was written to in place counts as the same tensor: that it is not is told later.
    """
    x, region = sibling.x, facts.regions[sibling.node]
    while x.op == "call_function" and (packet(x) in _VIEWS or x in facts.mutated):
        source = aliased_argument(x) if x in facts.mutated else x.args[0]
        if not isinstance(source, fx.Node) or not is_tensor(source) or value(source).dim() == 0:
            break
        if not same(size_of(value(source).shape[-1]), size_of(value(x).shape[-1])):
            break
        if value(source).dtype != value(x).dtype or facts.regions.get(x) != region:
            break
        x = source
    return x


# ---- a family -----------------------------------------------------------------------------------


def _split(
    facts: Facts,
    family: Sequence[_Candidate],
    order: dict[fx.Node, int],
    sites: list[SiblingsSite],
    misses: list[tuple[fx.Node, Reason]],
) -> None:
    """Adds the sites and near-misses of products of one tensor."""
    groups: dict[object, list[_Candidate]] = defaultdict(list)
    for candidate in family:
        if candidate.obstacle is not None:
            misses.append((candidate.node, candidate.obstacle))
        else:
            groups[_kind(facts, candidate)].append(candidate)
    if not groups:
        return
    largest = max(groups.values(), key=len)
    for group in groups.values():
        ready = [group[0]]
        for candidate in group[1:]:
            late = _check_ready(facts, candidate, group[0].node, order)
            if late is None:
                ready.append(candidate)
            else:
                misses.append((candidate.node, late))
        if len(ready) > 1:
            sites += [_site(part, order) for part in _parts(ready)]
        elif group is not largest:
            misses.append((group[0].node, _difference(facts, group[0], largest[0])))


def _kind(facts: Facts, candidate: _Candidate) -> tuple[object, ...]:
    """What all members of one launch have in common."""
    return facts.regions[candidate.node], candidate.weight_is_rank_innermost


def _difference(facts: Facts, one: _Candidate, other: _Candidate) -> Reason:
    """Why ``one`` shares no launch with ``other``."""
    node, beside = one.node, other.node
    if facts.regions[node] != facts.regions[beside]:
        observed = f"autocast or grad mode switches between it and {beside.name}"
        return reason_at(node, Code.REGION_CROSSED, observed)
    lies = ("in_features", "rank")[one.weight_is_rank_innermost]
    return reason_at(node, Code.BAD_LAYOUT, f"a weight with {lies} innermost in memory",
                     f"as that of {beside.name}")  # fmt: skip


def _check_ready(
    facts: Facts, candidate: _Candidate, anchor: fx.Node, order: dict[fx.Node, int]
) -> Reason | None:
    """A reason if an operand is computed after ``anchor`` by more than a view."""
    for node in _computed_after(candidate.sibling, anchor, order):
        is_view = is_layout(node) or node.target is operator.getitem
        if not is_view or facts.regions.get(node) != facts.regions[anchor]:
            observed = f"{node.name} is computed after {anchor.name}"
            required = "a weight, or a view of one"
            return reason_at(candidate.node, Code.NOT_YET_COMPUTED, observed, required)
    return None


def _computed_after(sibling: Sibling, anchor: fx.Node, order: dict[fx.Node, int]) -> list[fx.Node]:
    """What the weight and the bias need and what stands after ``anchor``."""
    found: set[fx.Node] = set()
    pending = [node for node in (sibling.weight, sibling.bias) if node is not None]
    while pending:
        node = pending.pop()
        if order[node] > order[anchor] and node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return sorted(found, key=lambda node: order[node])


def _parts(group: list[_Candidate]) -> list[list[_Candidate]]:
    """As few parts of MAX_SIBLINGS at most as will do, of nearly equal size."""
    count = -(-len(group) // MAX_SIBLINGS)
    bounds = [len(group) * index // count for index in range(count + 1)]
    return [group[start:stop] for start, stop in itertools.pairwise(bounds)]


def _site(part: Sequence[_Candidate], order: dict[fx.Node, int]) -> SiblingsSite:
    members = tuple(candidate.sibling for candidate in part)
    nodes = [member.node for member in members]
    hoisted = {node for m in members for node in _computed_after(m, nodes[0], order)}
    return SiblingsSite(
        nodes[0],
        common_path(nodes) if all(map(module_path, nodes)) else "",
        frozenset(nodes),
        members,
        tuple(sorted(hoisted, key=lambda node: order[node])),
        _product(shape_of(value(members[0].x))[:-1]),
    )
