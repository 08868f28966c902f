"""How the facts of attention begin, travel and end: scores, probabilities, candidates."""

import math
from collections.abc import Sequence
from dataclasses import replace

import sympy
from torch import fx

from flashsvd_compile.analysis.attention_facts import Operand, Probabilities, ScoreMask, Scores
from flashsvd_compile.analysis.axes import Dim, Dims, same, shape_of
from flashsvd_compile.analysis.calls import arguments, aten, constant, is_tensor, packet, value
from flashsvd_compile.analysis.contraction import Contraction, Letters
from flashsvd_compile.analysis.factored import label_like
from flashsvd_compile.analysis.facts import AttentionCandidate, Facts, Miss
from flashsvd_compile.analysis.low_rank import is_low_rank
from flashsvd_compile.analysis.masks import NO_WEIGHT_BELOW
from flashsvd_compile.reason import Code, Reason, reason_at

# ---- scaled_dot_product_attention ---------------------------------------------------------------


def sdpa(facts: Facts, node: fx.Node) -> None:
    named = arguments(node)
    q, k, v = named["query"], named["key"], named["value"]
    if named["dropout_p"] != 0:
        reason = reason_at(node, Code.DROPOUT_ACTIVE, f"dropout_p={named['dropout_p']}", "0.0")
        facts.misses.append(Miss("attention", node, reason))
        return
    scale = constant(named["scale"])
    if scale is None:
        head_dim = shape_of(value(q))[-1]
        if named["scale"] is not None or not isinstance(head_dim, sympy.Integer):
            observed = f"scale {named['scale'] or f'1/sqrt({head_dim})'}"
            reason = reason_at(node, Code.DATA_DEPENDENT_SCALE, observed, "a number")
            facts.misses.append(Miss("attention", node, reason))
            return
        scale = 1 / math.sqrt(int(head_dim))
    shape = shape_of(value(node))
    rank = len(shape)
    if value(q).dim() != rank:
        return
    *outer, width = shape
    kept = (facts.space.varying(*pair) for pair in zip(facts.axes[q], outer, strict=False))
    dims = (*kept, *facts.space.fresh((width,)))
    facts.axes[node] = dims
    mask = named["attn_mask"]
    masks: tuple[ScoreMask, ...] = ()
    key_rows = facts.space.fresh([shape_of(value(k))[-2]])[0]
    if mask is not None:
        labels = label_like(facts.space, (*dims[:-1], key_rows), shape_of(value(mask)))
        if labels is None:
            return
        boolean = not value(mask).dtype.is_floating_point
        masks = (ScoreMask(mask, labels, -math.inf if boolean else None, fill_where=False),)
    facts.candidates.append(
        AttentionCandidate(
            node,
            query=_sdpa_operand(q, dims),
            key=_sdpa_operand(k, dims),
            value=_sdpa_operand(v, dims),
            batch=dims[:-2],
            rows=dims[-2],
            key_rows=key_rows,
            feature=dims[-1],
            scale=scale,
            is_causal=named["is_causal"],
            masks=masks,
        )
    )


def _sdpa_operand(node: fx.Node, dims: Dims) -> Operand:
    own, rank = value(node).dim(), len(dims)
    batch = tuple(i - (rank - own) if i >= rank - own else -1 for i in range(rank - 2))
    return Operand(node, batch, (own - 2,), (own - 1,), dims[:-2])


# ---- by hand ------------------------------------------------------------------------------------


def product(facts: Facts, product: Contraction, dims: Dims) -> None:
    """A product of two activations: scores, or probabilities times values."""
    for side, other in ((0, 1), (1, 0)):
        weights = (product.left, product.right)[side]
        if weights in facts.probabilities:
            if product.bias is not None or product.scale != 1:
                observed = f"{product.node.target} adds to the weighted values, or scales them"
                miss_here(
                    facts, product.node, reason_at(product.node, Code.OP_NOT_CARRIED, observed)
                )
                return
            _weighted_sum(facts, product, dims, side, other)
            return
        if weights in facts.sinks:
            observed = f"{product.node.target} of the sink's column, too"
            miss_here(facts, product.node, reason_at(product.node, Code.OP_NOT_CARRIED, observed))
            return
        values = (product.left, product.right)[other]
        if (
            weights in facts.ended
            and values in facts.factored
            and is_low_rank(facts, facts.factored[values])
        ):
            facts.misses.append(Miss("attention", product.node, facts.ended[weights]))
            return
    if product.left in facts.weights:
        return
    names = dict(zip(product.out_letters, dims, strict=True))
    left, right = (_operand(product, side, names) for side in (0, 1))
    if not left.rows or not right.rows:
        return
    masks: tuple[ScoreMask, ...] = ()
    if product.bias is not None:
        labels = label_like(facts.space, dims, shape_of(value(product.bias)))
        if labels is None:
            return
        masks = (ScoreMask(product.bias, labels),)
    facts.scores[product.node] = Scores(
        product.node,
        left,
        right,
        batch=_atoms(names, _batch(product)),
        left_rows=_atoms(names, _own(product, 0)),
        right_rows=_atoms(names, _own(product, 1)),
        scale=product.scale,
        masks=masks,
    )


def _letters(product: Contraction, side: int) -> Letters:
    return (product.left_letters, product.right_letters)[side]


def _batch(product: Contraction) -> list[str]:
    """Letters of the output that are nobody's own: shared, or broadcast from one operand."""
    own = {*_own(product, 0), *_own(product, 1)}
    return [letter for letter in product.out_letters if letter not in own]


def _own(product: Contraction, side: int) -> list[str]:
    """Letters that one operand alone brings. In a matmul's spelling, missing leading dimensions
    are broadcast batch, not rows: only the last two have capital letters there."""
    mine, theirs = _letters(product, side), _letters(product, 1 - side)
    own = [c for c in product.out_letters if c in mine and c not in theirs]
    matmul = any(c in "MN" for c in product.out_letters)
    return [c for c in own if c in "MN"] if matmul else own


def _operand(product: Contraction, side: int, names: dict[str, Dim]) -> Operand:
    letters = _letters(product, side)
    contracted = [c for c in product.left_letters if c in product.contracted]
    return Operand(
        (product.left, product.right)[side],
        tuple(letters.index(c) if c in letters else -1 for c in _batch(product)),
        tuple(letters.index(c) for c in _own(product, side)),
        tuple(letters.index(c) for c in contracted),
        tuple(names[c] for c in _batch(product)),
    )


def _atoms(names: dict[str, Dim], letters: Sequence[str]) -> Dim:
    return tuple(atom for letter in letters for atom in names[letter])


def _weighted_sum(facts: Facts, product: Contraction, dims: Dims, side: int, other: int) -> None:
    node = (product.left, product.right)[side]
    fact = facts.probabilities[node]
    space = facts.space
    by_letter = dict(zip(_letters(product, side), facts.axes[node], strict=True))
    contracted = [c for c in _letters(product, side) if c in product.contracted]
    keys = space.leaves(_atoms(by_letter, contracted))
    if keys != space.leaves(fact.key_rows):
        observed = "probabilities are contracted over another axis than the softmax's"
        miss_here(facts, product.node, reason_at(product.node, Code.SOFTMAX_AXIS, observed))
        return
    value_letters = _letters(product, other)
    rows = [c for c in product.out_letters if c in by_letter
            and set(space.leaves(by_letter[c])) & set(space.leaves(fact.query_rows))]  # fmt: skip
    feature = [c for c in product.out_letters if c in value_letters and c not in by_letter]
    batch = [c for c in product.out_letters if c not in rows and c not in feature]
    names = dict(zip(product.out_letters, dims, strict=True))
    if space.leaves(_atoms(names, batch)) != space.leaves(fact.batch) or not feature:
        return
    facts.candidates.append(
        AttentionCandidate(
            product.node,
            fact.query,
            fact.key,
            Operand(
                (product.left, product.right)[other],
                tuple(value_letters.index(c) if c in value_letters else -1 for c in batch),
                tuple(value_letters.index(c) for c in contracted),
                tuple(value_letters.index(c) for c in feature),
                tuple(names[c] for c in batch),
            ),
            batch=tuple(names[c] for c in batch),
            rows=_atoms(names, rows),
            key_rows=fact.key_rows,
            feature=_atoms(names, feature),
            scale=fact.scale,
            is_causal=False,
            masks=fact.masks,
            softcap=fact.softcap,
            sink=fact.sink,
        )
    )


def softmax(facts: Facts, node: fx.Node) -> None:
    named = arguments(node)
    scores = facts.scores[named["self"]]
    dims = facts.axes[named["self"]]
    facts.axes[node] = dims
    over = facts.space.leaves(dims[named["dim"] % len(dims)])
    found = probabilities_of(facts, scores, over)
    if found is None:
        required = "softmax over the keys"
        reason = reason_at(node, Code.SOFTMAX_AXIS, f"softmax over dim {named['dim']}", required)
        miss_here(facts, node, reason)
        return
    facts.probabilities[node] = found


def probabilities_of(facts: Facts, scores: Scores, over: Dim) -> Probabilities | None:
    """The softmax of ``scores`` along the atoms ``over``; None where those are not the keys."""
    left, right = (facts.space.leaves(rows) for rows in (scores.left_rows, scores.right_rows))
    if over not in (left, right):
        return None
    query, key = (scores.left, scores.right) if over == right else (scores.right, scores.left)
    query_rows, key_rows = (
        (scores.left_rows, scores.right_rows) if over == right
        else (scores.right_rows, scores.left_rows)
    )  # fmt: skip
    return Probabilities(
        query, key, scores.batch, query_rows, key_rows, scores.scale, scores.masks, scores.softcap
    )


def elementwise(facts: Facts, node: fx.Node) -> bool:
    """Scale or mask scores. False if no operand of ``node`` is scores."""
    operands = [a for a in node.args if isinstance(a, fx.Node) and a in facts.scores]
    if not operands:
        return False
    source = operands[0]
    scores = facts.scores[source]
    changed = _scaled(node, source, scores) or _capped(node, scores)
    changed = changed or _masked(facts, node, source, scores)
    shape = [shape_of(value(n)) for n in (node, source)]
    if changed is None or len(operands) > 1 or not all(map(same, *shape)):
        code, observed = Code.OP_NOT_CARRIED, str(node.target)
        if packet(node) is aten.tanh:
            observed += " of capped scores" if scores.softcap else " of masked scores"
        if packet(node) in (aten.mul, aten.div):
            code = Code.DATA_DEPENDENT_SCALE
        miss_here(facts, node, reason_at(node, code, observed, "a number or a mask"))
        return True
    facts.axes[node] = facts.axes[source]
    facts.scores[node] = changed
    return True


def _scaled(node: fx.Node, source: fx.Node, scores: Scores) -> Scores | None:
    others = [a for a in node.args[:2] if a is not source]
    number = constant(others[0]) if len(others) == 1 else None
    if number is None or scores.masks or (scores.softcap and not number):
        return None
    if packet(node) is aten.mul:
        return scores.scaled(number)
    if packet(node) is aten.div and node.args[0] is source and number:
        return scores.scaled(1 / number)
    return None


def _capped(node: fx.Node, scores: Scores) -> Scores | None:
    if packet(node) is not aten.tanh or scores.masks or scores.softcap:
        return None
    return replace(scores, softcap=1.0)


def _masked(facts: Facts, node: fx.Node, source: fx.Node, scores: Scores) -> Scores | None:
    named = arguments(node)
    kind = packet(node)
    if kind is aten.add and constant(named["alpha"]) == 1:
        other = named["other"] if named["self"] is source else named["self"]
        return _with_mask(facts, source, scores, other, None, True)
    if kind is aten.masked_fill and named["self"] is source:
        return _with_mask(facts, source, scores, named["mask"], constant(named["value"]), True)
    if kind is aten.where and source in (named["self"], named["other"]):
        keeps = named["self"] is source
        fill = constant(named["other"] if keeps else named["self"])
        return _with_mask(facts, source, scores, named["condition"], fill, not keeps)
    return None


def _with_mask(
    facts: Facts, source: fx.Node, scores: Scores, mask: object, fill: float | None, where: bool
) -> Scores | None:
    if not isinstance(mask, fx.Node) or not is_tensor(mask) or mask in facts.scores:
        return None
    if mask in facts.mutated:
        return None  # the site reads it later than this node does
    boolean = value(mask).dtype.is_floating_point is False
    if boolean != (fill is not None) or (fill is not None and fill > NO_WEIGHT_BELOW):
        return None
    labels = label_like(facts.space, facts.axes[source], shape_of(value(mask)))
    return None if labels is None else scores.masked(ScoreMask(mask, labels, fill, where))


def miss_here(facts: Facts, node: fx.Node, reason: Reason) -> None:
    """Scores end at ``node``: a near-miss if queries or keys are low-rank, or, as their weighted
    sum will tell, the values."""
    known = [
        fact
        for source in node.all_input_nodes
        for fact in (facts.scores.get(source), facts.probabilities.get(source))
        if fact is not None
    ]
    known += [
        facts.sinks[source].scores for source in node.all_input_nodes if source in facts.sinks
    ]
    for fact in known:
        ends = (fact.left, fact.right) if isinstance(fact, Scores) else (fact.query, fact.key)
        if any(end.node in facts.factored for end in ends):
            facts.misses.append(Miss("attention", node, reason))
            return
    if known:
        facts.ended[node] = reason


def pass_on_end(facts: Facts, node: fx.Node) -> None:
    """What is made of scores that ended, by all but a product, has ended with them."""
    for source in node.all_input_nodes:
        if source in facts.ended:
            facts.ended.setdefault(node, facts.ended[source])
