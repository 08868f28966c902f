"""Lifts that others read beside attention, each other rows: what has to stay for them.

    y = linear(p, w);  q, k, v = y.split(..)     q and k are rotated and read at full width
    sdpa(rope(q), rope(k), v)                    v may stay the latent p, if w's rows for q and k
                                                 make a product of their own

Which rows of the factor a tensor holds follows from its fact, however it was cut from y. A lift
may be narrowed if all others read other rows than attention does, through views that nobody can
look past, and if those rows make products (see ``remainders``).
"""

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from flashsvd_compile.analysis.calls import aliased_argument, aten, is_tensor, packet, value
from flashsvd_compile.analysis.facts import Facts
from flashsvd_compile.analysis.layout import is_layout
from flashsvd_compile.analysis.regions import holds_tensors, other_user
from flashsvd_compile.analysis.remainders import places_of, product_of, remainders_of
from flashsvd_compile.analysis.shared_lift_records import SharedLift
from flashsvd_compile.analysis.site_records import Arm
from flashsvd_compile.reason import Code, Reason, reason_at

# They read memory wherever strides lead them, past the tensor that they are given.
_LOOK_PAST = {aten.as_strided, aten.as_strided_copy, aten.as_strided_scatter, aten._reshape_alias}


def share_lifts(
    facts: Facts,
    arms: Sequence[Arm],
    inputs: Sequence[fx.Node],
    core: frozenset[fx.Node],
    allowed: frozenset[fx.Node],
) -> tuple[list[Arm], tuple[SharedLift, ...]]:
    """q, k and v, and what stays of their lifts; dense where others read one that cannot be cut.

    ``core``: what attention does with its ``inputs``. ``allowed``: nodes that may read a lift that
    stays whole. What makes an input that turned out to be dense is among them.
    """
    gone = core.union(*(arm.region for arm in arms))
    found = dict(zip("qkv", arms, strict=True))
    by_lift: dict[fx.Node, dict[str, fx.Node]] = {}
    for (name, arm), node in zip(found.items(), inputs, strict=True):
        if arm.factor is not None and other_user(arm.region, gone):
            by_lift.setdefault(facts.factored[node].lift, {})[name] = node
    shared = []
    for nodes in by_lift.values():
        turned = frozenset().union(*(found[n].region for n in nodes if found[n].rotation))
        left = shared_lift(facts, nodes, gone, turned)
        if not isinstance(left, Reason):
            shared.append(left)
            continue
        for name in nodes:
            if other_user(found[name].region, allowed):
                found[name] = found[name].as_dense(left)
    return list(found.values()), tuple(shared)


def shared_lift(
    facts: Facts,
    inputs: Mapping[str, fx.Node],
    gone: frozenset[fx.Node],
    turned: frozenset[fx.Node] = frozenset(),
) -> SharedLift | Reason:
    """What stays of the lift that makes all ``inputs``, by arm, once ``gone`` read it no more.

    ``turned``: what leads from inputs to attention.
    """
    nodes = list(inputs.values())
    lift = facts.factored[nodes[0]].lift
    if read := other_user((n for n in turned if not _holds(facts, n, lift)), gone):
        return read
    if torch.is_grad_enabled():
        observed = f"{lift.name} is also read outside, and its factor would get gradients in parts"
        return reason_at(lift, Code.GRADIENTS, observed, "inference")
    found = _readers(facts, nodes, gone)
    if isinstance(found, Reason):
        return found
    readers, region = found
    for reader in readers:
        if problem := _check_reader(facts, reader, lift):
            return problem
    remainders = remainders_of(facts, readers)
    if isinstance(remainders, Reason):
        return remainders
    whole = product_of(facts, facts.factored[lift], lift, ())
    if isinstance(whole, Reason):
        return whole
    return SharedLift(lift, frozenset(inputs), remainders, frozenset(region), whole.shape)


# ---- who reads what -----------------------------------------------------------------------------


def _readers(
    facts: Facts, inputs: Sequence[fx.Node], gone: frozenset[fx.Node]
) -> tuple[list[fx.Node], set[fx.Node]] | Reason:
    """The first nodes outside of ``gone`` that hold none of the inputs' rows, and all that lead
    there from the lift."""
    lift = facts.factored[inputs[0]].lift
    own = places_of(facts, inputs)
    if isinstance(own, Reason):
        return own
    readers: list[fx.Node] = []
    pending = sorted(node for node in gone if _holds(facts, node, lift))
    region = {lift}
    for node in pending:
        for user in node.users:
            if user in gone or user in region or not (user.op == "output" or holds_tensors(user)):
                continue
            is_view = is_layout(user) or user.target is operator.getitem
            if not (is_view and _holds(facts, user, lift)):
                observed = f"{node.name} is also read by {user.name}"
                required = "no reader outside, or such as read other rows of the lift"
                return reason_at(node, Code.WIDE_HAS_OTHER_USER, observed, required)
            region.add(user)
            places = places_of(facts, [user]) if is_tensor(user) else own
            if isinstance(places, Reason):
                return places
            if places & own:
                pending.append(user)
            else:
                readers.append(user)
    return readers, region


def _holds(facts: Facts, node: fx.Node, lift: fx.Node) -> bool:
    """Is ``node`` made of rows of the lift, or a list of such?"""
    if node in facts.pieces:
        source = node.args[0]
        return isinstance(source, fx.Node) and _holds(facts, source, lift)
    return node in facts.factored and facts.factored[node].lift is lift


def _check_reader(facts: Facts, reader: fx.Node, lift: fx.Node) -> Reason | None:
    """Why ``reader`` has to stay a view of the whole lift."""
    if facts.regions[reader] != facts.regions[lift]:
        return reason_at(reader, Code.REGION_CROSSED, "autocast or grad mode changes inside")
    if value(reader).dtype != value(lift).dtype:
        return reason_at(reader, Code.DTYPE, str(value(reader).dtype), str(value(lift).dtype))
    views = [reader]
    for node in views:
        for user in node.users:
            if user.op == "output" or packet(user) in _LOOK_PAST:
                observed = f"{node.name}, a view of {lift.name}, is read by {user.name}"
                required = "views that stay in the graph"
                return reason_at(node, Code.WIDE_HAS_OTHER_USER, observed, required)
            if aliased_argument(user) is node:
                views.append(user)
    return None
